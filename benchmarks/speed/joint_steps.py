"""The ways of training T tasks on one image set that `joint.py` compares, each as a function that takes one step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allinone_ds import TBGC, FeatureBalance, TaskBalancer, task_features
from benchmarks.common.memory import storage_bytes
from benchmarks.common.vit import build_engine, build_model

CLASSES = 20
BUCKET = 10**6
"""Elements that ZeRO reduces at once; its buffer of so many is not to hide the differences between the ways."""
ENGINES = ("plain sum", "separate", "backbone", "features", "norm=features")
TORCH = ("torch sum", "FeatureBalance")
LOCAL = ("torchjd mtl_backward", "torchjd at features", "torchjd autogram", "LibMTL", "LibMTL rep_grad")
SLOW = ("separate", "backbone", "torchjd mtl_backward", "torchjd autogram", "LibMTL")
"""Ways with T backwards through the backbone."""


def ways_for(ranks: int) -> tuple[str, ...]:
    """Return the ways that run on R ranks; the other libraries run in one process."""
    return ENGINES + TORCH + (LOCAL if ranks == 1 else ())


def base_of(way: str) -> str:
    """Return the plain sum that a way is compared with: on the same kind of engine."""
    return "plain sum" if way in ENGINES else "torch sum"


class DenseModel(nn.Module):
    """A ViT and one linear head per task on all of its tokens, as for dense prediction.

    Args:
        backbone: the ViT.
        tasks: names of the T tasks.
        width: channels C.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], width: int):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({task: nn.Linear(width, CLASSES) for task in tasks})

    def features(self, x: Tensor) -> Tensor:
        """Return what the heads read, (B, N, C)."""
        return self.backbone(x).last_hidden_state

    def loss(self, task: str, features: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over tokens."""
        logits = self.heads[task](features).float()  # (B, N, K)
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def forward(self, x: Tensor, y: Mapping[str, Tensor], tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the loss of each task from one forward of the backbone."""
        features = self.features(x)
        return {task: self.loss(task, task_features(features, task), y[task]) for task in tasks or self.heads}


def random_labels(args: argparse.Namespace, tasks: Sequence[str], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images (B, 3, H, W) and task -> labels (B, N) of the tokens, the class token among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    shape = (args.batch, (args.size // 16) ** 2 + 1)
    return x, {task: torch.randint(CLASSES, shape, generator=generator) for task in tasks}


class Way(NamedTuple):
    """One way of training, ready to run."""

    step: Callable[[], Any]
    """Takes one optimizer step."""
    held: Callable[[], int]
    """Returns the bytes of weights and optimizer state on this rank."""


def make_way(way: str, tasks: Sequence[str], args: argparse.Namespace) -> Way:
    """Return a way with a model and an optimizer of its own. Call on every rank."""
    x, y = random_labels(args, tasks, dist.get_rank())
    backbone = build_model(args.width, args.layers, args.size, ()).backbone
    backbone.embeddings.mask_token.requires_grad_(False)  # unused, which DistributedDataParallel refuses
    model = DenseModel(backbone, tasks, args.width)
    if way in ENGINES:
        engine = build_engine(model, 2, 1, args.batch, bucket=BUCKET)
        masters = engine.optimizer.single_partition_of_fp32_groups
        held = _held(model, engine.optimizer.optimizer, masters)
        return Way(_engine_step(way, tasks, engine, x, y), held)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    compute = _torch_step(way, tasks, model, x, y) if way in TORCH else _local_step(way, tasks, model, x, y)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute()
        optimizer.step()

    return Way(step, _held(model, optimizer))


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, masters: Sequence[Tensor] = ()) -> Callable[[], int]:
    def count() -> int:
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return storage_bytes([*model.parameters(), *masters, *states])

    return count


def _engine_step(way: str, tasks: Sequence[str], engine: Any, x: Tensor, y: Mapping[str, Tensor]) -> Callable[[], Any]:
    def plain() -> None:
        engine.backward(torch.stack(list(engine(x, y).values())).sum())
        engine.step()

    if way == "plain sum":
        return plain
    norm = "features" if way == "norm=features" else "exact"
    balancer = TaskBalancer(engine, tasks, "backbone", TBGC(0.1), norm=norm)

    def separate() -> None:
        for task in tasks:
            with balancer.task(task):
                balancer.backward(engine(x, y, (task,))[task])
        balancer.step()

    def joint() -> None:
        with balancer.joint(tasks, at="backbone" if way == "backbone" else "features"):
            balancer.backward(engine(x, y))
        balancer.step()

    return separate if way == "separate" else joint


def _torch_step(way: str, tasks: Sequence[str], model: Any, x: Tensor, y: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return the backward of a way without DeepSpeed, on any number of ranks."""
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    balance = FeatureBalance(tasks, TBGC(0.1))

    def features() -> None:
        with balance.joint():
            balance.backward(wrapped(x, y))

    def plain() -> None:
        torch.stack(list(wrapped(x, y).values())).sum().backward()

    return plain if way == "torch sum" else features


def _local_step(way: str, tasks: Sequence[str], model: Any, x: Tensor, y: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return the backward of a way of another library, in one process."""
    from torchjd.aggregation import IMTLG, IMTLGWeighting
    from torchjd.autogram import Engine
    from torchjd.autojac import jac_to_grad, mtl_backward

    shared = [p for p in model.backbone.parameters() if p.requires_grad]

    def losses(features: Tensor) -> list[Tensor]:
        return [model.loss(task, features, y[task]) for task in tasks]

    def at_parameters() -> None:
        features = model.features(x)
        mtl_backward(losses(features), features, shared_params=shared)
        jac_to_grad(shared, IMTLG())

    def at_features() -> None:
        features = model.features(x)
        read = features.detach().requires_grad_()
        joined = read * 1.0
        mtl_backward(losses(joined), joined, shared_params=[read])
        jac_to_grad([read], IMTLG())
        features.backward(read.grad)

    def autogram() -> None:
        values = torch.stack(losses(model.features(x)))  # (T,)
        values.backward(IMTLGWeighting()(gram.compute_gramian(values)))

    # after LibMTL, weighting/abstract_weighting.py and architecture/abstract_arch.py: gradients of one task at a time
    # into a matrix (T, P), or (T, B, N, C) with `rep_grad`, where each head reads a copy of the representation
    def libmtl() -> None:
        values = losses(model.features(x))
        rows = torch.zeros(len(tasks), sum(p.numel() for p in shared))  # (T, P)
        for index, value in enumerate(values):
            value.backward(retain_graph=index + 1 < len(values))
            rows[index] = torch.cat(
                [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in shared]
            )
            model.backbone.zero_grad()
        summed = torch.einsum("i, i... -> ...", 0.1 / rows.norm(dim=1), rows)
        for p, part in zip(shared, summed.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p).clone()

    def libmtl_rep_grad() -> None:
        features = model.features(x)
        copies = [features.detach().clone().requires_grad_() for _ in tasks]
        values = [model.loss(task, copy, y[task]) for task, copy in zip(tasks, copies, strict=True)]
        rows = torch.zeros(len(tasks), *features.shape)  # (T, B, N, C)
        for index, value in enumerate(values):
            value.backward(retain_graph=index + 1 < len(values))
            rows[index] = copies[index].grad.clone()
        features.backward(torch.einsum("i, i... -> ...", 0.1 / rows.flatten(1).norm(dim=1), rows))

    if way == "torchjd autogram":
        gram = Engine(model.backbone, batch_dim=None)
    return dict(zip(LOCAL, (at_parameters, at_features, autogram, libmtl, libmtl_rep_grad), strict=True))[way]
