"""A toy multi-task problem with a float64 answer: the model and its data.

Three tasks whose losses differ by 3,000x share a small backbone; micro-steps differ between tasks; one head is used in
the last micro-step only. `allinone_ds.testing.reference` computes what any engine on R ranks must reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("det", "seg", "cls")
LOSS_SCALE = {"det": 1.0, "seg": 3000.0, "cls": 30.0}


def rate(weighting: Mapping[str, Any]) -> float:
    """SGD's learning rate: small where raw gradients reach the weights, or the losses' 3,000x would blow them up."""
    raw = (
        weighting["name"] == "sum"
        or weighting.get("heads") == "none"
        or weighting.get("target", "constant") != "constant"
    )
    return RAW_RATE if raw else 0.05


RAW_RATE = 1e-5
"""SGD's learning rate where raw gradients reach the weights."""


class Backbone(nn.Module):
    """Sizes are odd, so that partitions straddle parameters and ranks; `frozen` and `unused` get no gradient."""

    def __init__(self, checkpointing: bool = False, width: int = 13, depth: int = 3):
        super().__init__()
        self.stem = nn.Linear(9, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.unused = nn.Parameter(torch.ones(7))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.checkpointing = checkpointing
        self.checkpoint: Callable[..., Tensor] = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            if self.checkpointing:
                x = self.checkpoint(lambda y, b=block: y + torch.tanh(b(y)), x)
            else:
                x = x + torch.tanh(block(x))
        return self.frozen(x)


def _unmarked(features: Tensor, task: str) -> Tensor:
    return features


class ToyModel(nn.Module):
    """`forward(task, x, last)` returns the task's loss, a mean over the batch; of several tasks, task -> loss.

    Attributes:
        mark: called with what a head reads and its task; `allinone_ds.task_features`, where that is balanced.
    """

    def __init__(self, checkpointing: bool = False, width: int = 13, depth: int = 3):
        super().__init__()
        self.backbone = Backbone(checkpointing, width, depth)
        outputs = {"det": 5, "seg": 11, "cls": 3}
        self.heads = nn.ModuleDict({task: nn.Linear(width, count) for task, count in outputs.items()})
        self.late = nn.Linear(width, 2)  # the seg task uses it in its last micro-step only
        self.mark: Callable[[Tensor, str], Tensor] = _unmarked

    def forward(self, task: str | Sequence[str], x: Tensor, last: bool = False) -> Any:
        features = self.backbone(x)
        if isinstance(task, str):
            return self.loss(task, self.mark(features, task), last)
        return {name: self.loss(name, self.mark(features, name), last) for name in task}

    def loss(self, task: str, features: Tensor, last: bool = False) -> Tensor:
        """Return the loss of one task from what its head reads."""
        loss = _mean_square(self.heads[task](features))
        if task == "seg" and last:
            loss = loss + _mean_square(self.late(features))
        return loss * LOSS_SCALE[task]


def _mean_square(x: Tensor) -> Tensor:
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).square().mean()


def make_model(seed: int = 0, checkpointing: bool = False, width: int = 13, depth: int = 3) -> ToyModel:
    """Return a model with the same float64 weights on every rank.

    Args:
        seed: of the weights.
        checkpointing: recompute the backbone's blocks in backward.
        width: channels of the backbone.
        depth: blocks of the backbone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyModel(checkpointing, width, depth).double()


def inputs(task: str, step: int, micro_step: int, rank: int) -> Tensor:
    """A rank's micro-batch, (4, 9), float64; unlike on any other rank, task, step or micro-step."""
    seed = ((step * 97 + TASKS.index(task)) * 89 + micro_step) * 83 + rank
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def param_groups(model: ToyModel, per_head: bool = True, head_lr: float | None = None) -> list[dict]:
    """Optimizer groups: the backbone and each head apart, or (per_head=False) everything in one.

    Args:
        model: the model.
        per_head: whether there is more than one group.
        head_lr: learning rate of the heads; None: that of the optimizer.
    """
    if not per_head:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    modules = [model.backbone, *model.heads.values(), model.late]
    groups: list[dict] = [{"params": [p for p in module.parameters() if p.requires_grad]} for module in modules]
    for group in groups[1:] if head_lr is not None else []:
        group["lr"] = head_lr
    return groups
