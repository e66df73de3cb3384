"""Checks of balancing at the features on ranks; started by test_features.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from allinone_ds import TBGC, FeatureBalance, GramWeighting, Sum, task_features
from tests.launcher import join_ranks, run_checks

TASKS = {"a": 1.0, "b": 9.0, "c": 0.1}


class Model(nn.Module):
    """Heads of different outputs on two feature maps of one backbone."""

    def __init__(self, runs_every_head: bool = False) -> None:
        super().__init__()
        self.runs_every_head = runs_every_head
        self.backbone = nn.ModuleList((nn.Linear(5, 7), nn.Linear(7, 7)))
        self.heads = nn.ModuleDict({task: nn.Linear(14, i + 1) for i, task in enumerate(TASKS)})

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(self.backbone[0](x))
        return first, torch.tanh(self.backbone[1](first))

    def loss(self, task: str, features: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of each sample, (B,)."""
        return (self.heads[task](torch.cat(features, dim=-1)) - 0.5).square().mean(-1) * TASKS[task]

    def forward(self, x: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor | None]:
        features = self.features(x)
        losses = {}
        for task in TASKS:
            each = self.loss(task, task_features(features, task))
            chosen = labels[task]
            losses[task] = each[chosen].mean() if bool(chosen.any()) or self.runs_every_head else None
        return losses


def make_model(runs_every_head: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(runs_every_head).double()


def batch(rank: int, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (4, 5) inputs and task -> which samples have a label, (4,); rank 1 has no label of "b"."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    labels = {"a": [True] * 4, "b": [rank != 1] * 4, "c": [True, rank == 0, False, False]}
    return x, {task: torch.tensor(chosen) for task, chosen in labels.items()}


def reference(weighting, world: int, counted: bool, step: int = 0) -> tuple[dict[str, Tensor], list[float]]:
    """Return the gradients and the tasks' norms, computed on one process from the features of all ranks."""
    model = make_model()
    batches = [batch(rank, step) for rank in range(world)]
    features = [model.features(x) for x, _ in batches]
    copies = [tuple(f.detach().requires_grad_() for f in of_rank) for of_rank in features]
    rows, total = [], torch.zeros((), dtype=torch.float64)
    for task in TASKS:
        chosen = [labels[task] for _, labels in batches]
        sums = [model.loss(task, copy)[c] for copy, c in zip(copies, chosen, strict=True)]
        losses = [s.mean() for s in sums if len(s)]
        loss = torch.cat(sums).mean() if counted else torch.stack(losses).mean()
        flat = [tensor for copy in copies for tensor in copy]
        grads = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros_like(f).flatten() if g is None else g.flatten() for g, f in zip(grads, flat, strict=True)]
            )
        )
        total = total + loss
    jacobian = torch.stack(rows)  # (T, D)
    factors = weighting(jacobian @ jacobian.T)
    head_grads = torch.autograd.grad(total, list(model.heads.parameters()))
    at, wanted = 0, factors @ jacobian
    for of_rank in features:
        for tensor in of_rank:
            tensor.backward(wanted[at : at + tensor.numel()].view_as(tensor), retain_graph=True)
            at += tensor.numel()
    found = {f"backbone.{n}": p.grad for n, p in model.backbone.named_parameters()}
    names = [f"heads.{n}" for n, _ in model.heads.named_parameters()]
    return found | dict(zip(names, head_grads, strict=True)), jacobian.norm(dim=1).tolist()


def clip(gram: Tensor) -> Tensor:
    return (0.05 / (gram.diagonal().sqrt() + 1e-6)).clamp(max=1.0)


def inverse(gram: Tensor) -> Tensor:
    return gram.sum(1).abs().rsqrt()


WEIGHTINGS = {
    "tbgc": (TBGC(max_norm=0.05), clip),
    "sum": (Sum(), lambda gram: torch.ones(len(gram), dtype=gram.dtype)),
    "gram": (GramWeighting(inverse), inverse),
}


def run(wrap, weighting, counted: bool, runs_every_head: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Take the gradients of one step on this rank's batch; averaged over ranks as `wrap` does.

    A head that every rank runs returns nan where there is no label, which counts 0.
    """
    model = make_model(runs_every_head)
    wrapped = wrap(model)
    x, labels = batch(dist.get_rank())
    balance = FeatureBalance(TASKS, weighting)
    with balance.joint():
        count = {task: int(chosen.sum()) for task, chosen in labels.items()} if counted else None
        if runs_every_head and not counted:
            count = {task: int(chosen.any()) for task, chosen in labels.items()}
        balance.backward(wrapped(x, labels), count)
    norms = {task: float(norm) for task, norm in balance.report().norms.items()}
    found = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = torch.zeros(p.shape) if gradient is None else gradient
    return found, norms


def check_ddp_equals_one_process() -> None:
    def wrap(model: Model) -> nn.Module:
        return DistributedDataParallel(model, find_unused_parameters=True)

    _compare(wrap, runs_every_head=False)
    _compare(DistributedDataParallel, runs_every_head=True)


def check_fsdp_equals_one_process() -> None:
    def wrap(model: Model) -> nn.Module:
        for head in model.heads.values():
            fully_shard(head)
        return fully_shard(model)

    _compare(wrap, runs_every_head=True)


def _compare(wrap, runs_every_head: bool) -> None:
    for name, (weighting, function) in WEIGHTINGS.items():
        for counted in (False, True):
            wanted, norms = reference(function, dist.get_world_size(), counted)
            found, seen = run(wrap, weighting, counted, runs_every_head)
            for task, norm in zip(TASKS, norms, strict=True):
                assert abs(seen[task] / norm - 1) < 1e-6, (name, counted, task, seen, norms)
            for key, value in wanted.items():
                off = float((found[key] - value).abs().max() / value.abs().max())
                assert off < 1e-6, (name, counted, key, off)


if __name__ == "__main__":
    join_ranks()
    run_checks({n.removeprefix("check_"): f for n, f in dict(globals()).items() if n.startswith("check_")}, sys.argv[1])
