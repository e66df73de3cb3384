"""A small multi-task model with what real models have: tied, unused, frozen, shared and nested parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEATURES = 5


class Backbone(nn.Module):
    """A residual stack on (B, 5) inputs; the sizes are odd, so that partitions straddle parameters and ranks."""

    def __init__(self, width: int, depth: int, traits: Sequence[str]):
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.recompute = "checkpointing" in traits
        if "unused" in traits:
            self.unused = nn.Parameter(torch.ones(3))
        if "frozen" in traits:
            self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = x + torch.tanh(checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x


class FuzzModel(nn.Module):
    """`forward(task, x, last)` returns the loss of a task, a mean over the batch.

    Args:
        tasks: name of a task -> factor of its loss.
        width: channels of the backbone.
        depth: blocks of the backbone.
        traits: any of "unused" (parameters without a gradient), "frozen" (a block of the backbone), "checkpointing",
            "nested" (the backbone is `trunk.body.backbone`), "tied" (the first two heads share their weight),
            "backbone tied" (the first head reads with the last block's weight), "neck" (a module that all heads but the
            first use), "late" (a layer that the last task uses in its last micro-step only), "head only" (the last task
            does not reach the backbone), "scalar" (a parameter with one element).
    """

    def __init__(self, tasks: Mapping[str, float], width: int, depth: int, traits: Sequence[str]):
        super().__init__()
        self.factors, self.traits = dict(tasks), tuple(traits)
        backbone = Backbone(width, depth, traits)
        self.trunk = nn.ModuleDict({"body": nn.ModuleDict({"backbone": backbone})}) if "nested" in traits else None
        if self.trunk is None:
            self.backbone = backbone
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2 + 3 * (i % 2)) for i, task in enumerate(tasks)})
        first, last = next(iter(tasks)), list(tasks)[-1]
        if "tied" in traits and len(tasks) > 1:
            self.heads[list(tasks)[1]] = nn.Linear(width, 2)
            self.heads[list(tasks)[1]].weight = self.heads[first].weight
        if "backbone tied" in traits:
            self.heads[first] = nn.Linear(width, width)
            self.heads[first].weight = backbone.blocks[-1].weight
        if "neck" in traits:
            self.neck = nn.Linear(width, width)
        if "late" in traits:
            self.late = nn.Linear(width, 1)
        if "scalar" in traits:
            self.scale = nn.Parameter(torch.ones(1))
        self.first, self.last = first, last

    @property
    def shared(self) -> str:
        """Dotted name of the backbone."""
        return "backbone" if self.trunk is None else "trunk.body.backbone"

    def forward(self, task: str, x: Tensor, last: bool) -> Tensor:
        x = self.get_submodule(self.shared)(x)
        if task == self.last and "head only" in self.traits:
            x = x.detach()
        if "neck" in self.traits and task != self.first:
            x = torch.tanh(self.neck(x))
        if "scalar" in self.traits:
            x = x * self.scale
        loss = _mean_square(self.heads[task](x) - 0.5)
        if "late" in self.traits and last and task == self.last:
            loss = loss + _mean_square(self.late(x))
        return loss * self.factors[task]


def _mean_square(x: Tensor) -> Tensor:
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).square().mean()


def make_model(shape: Mapping[str, Any], seed: int = 0) -> FuzzModel:
    """Return a model with the same float64 weights on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FuzzModel(**shape).double()


def inputs(task: int, step: int, micro_step: int, rank: int, batch: int) -> Tensor:
    """Return a rank's micro-batch, (batch, 5), float64."""
    seed = ((step * 97 + task) * 89 + micro_step) * 83 + rank
    return torch.randn(batch, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def param_groups(model: FuzzModel, one_group: bool) -> list[dict[str, Any]]:
    """Return optimizer groups: all in one, or the backbone in one and each parameter of the heads in one of its own."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if one_group:
        return [{"params": trainable}]
    backbone = [p for p in model.get_submodule(model.shared).parameters() if p.requires_grad]
    known = {id(p) for p in backbone}
    return [{"params": backbone}, *({"params": [p]} for p in trainable if id(p) not in known)]
