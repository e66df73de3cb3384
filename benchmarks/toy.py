"""A toy multi-task problem with a float64 answer: the model, its data, and balanced training by hand on one process.

Three tasks whose losses differ by 3,000x share a small backbone; micro-steps differ between tasks; one head is used in
the last micro-step only. `reference_run` computes what any engine on R ranks must reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TASKS = ("det", "seg", "cls")
LOSS_SCALE = {"det": 1.0, "seg": 3000.0, "cls": 30.0}


def rate(weighting: dict) -> float:
    """SGD's learning rate: small where raw gradients reach the weights, or the losses' 3,000x would blow them up."""
    raw = (
        weighting["name"] == "sum"
        or weighting.get("heads") == "none"
        or weighting.get("target", "constant") != "constant"
    )
    return 1e-5 if raw else 0.05


class Backbone(nn.Module):
    """Sizes are odd, so that partitions straddle parameters and ranks; `frozen` and `unused` get no gradient."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        self.stem = nn.Linear(9, 13)
        self.blocks = nn.ModuleList(nn.Linear(13, 13) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(7))
        self.frozen = nn.Linear(13, 13)
        self.frozen.requires_grad_(False)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            if self.checkpointing:
                x = x + torch.utils.checkpoint.checkpoint(lambda y, b=block: torch.tanh(b(y)), x, use_reentrant=False)
            else:
                x = x + torch.tanh(block(x))
        return self.frozen(x)


class ToyModel(nn.Module):
    """`forward(task, x, last)` returns the task's loss, a mean over the batch."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        self.backbone = Backbone(checkpointing)
        self.heads = nn.ModuleDict({"det": nn.Linear(13, 5), "seg": nn.Linear(13, 11), "cls": nn.Linear(13, 3)})
        self.late = nn.Linear(13, 2)  # the seg task uses it in its last micro-step only

    def forward(self, task: str, x: Tensor, last: bool = False) -> Tensor:
        features = self.backbone(x)
        loss = _mean_square(self.heads[task](features))
        if task == "seg" and last:
            loss = loss + _mean_square(self.late(features))
        return loss * LOSS_SCALE[task]


def _mean_square(x: Tensor) -> Tensor:
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).square().mean()


def make_model(seed: int = 0, checkpointing: bool = False) -> ToyModel:
    """The same float64 weights on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyModel(checkpointing).double()


def inputs(task: str, step: int, micro_step: int, rank: int) -> Tensor:
    """A rank's micro-batch, (4, 9), float64; unlike on any other rank, task, step or micro-step."""
    seed = ((step * 97 + TASKS.index(task)) * 89 + micro_step) * 83 + rank
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def param_groups(model: ToyModel, per_head: bool = True) -> list[dict]:
    """Optimizer groups: the backbone and each head apart, or (per_head=False) everything in one."""
    if not per_head:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    modules = [model.backbone, *model.heads.values(), model.late]
    return [{"params": [p for p in module.parameters() if p.requires_grad]} for module in modules]


@dataclass
class Reference:
    """What training must reach: final parameters, and per step the raw norms and factors of each task."""

    params: dict[str, Tensor]
    norms: list[dict[str, float]]
    scales: list[dict[str, float]]


def gradients(model: ToyModel, task: str, step: int, micro_steps: int, world: int) -> dict[str, Tensor]:
    """A task's gradient, mean over all ranks' micro-batches; parameters it does not reach are absent."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    for micro_step in range(micro_steps):
        for rank in range(world):
            x = inputs(task, step, micro_step, rank).to(next(model.parameters()).dtype)
            loss = model(task, x, micro_step == micro_steps - 1) / (micro_steps * world)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] = total.get(name, 0) + gradient.double()
    return total


def factors(weighting: dict, norms: dict[str, float], whole: dict[str, float]) -> dict[str, float]:
    """A weighting's factors, written from its formula, not from the package's code."""
    name, tau = weighting["name"], weighting.get("max_norm", 0.1)
    if name in ("sum", "global_clip"):
        return dict.fromkeys(norms, 1.0)
    base = whole if name == "task_clip" else norms
    target = weighting.get("target", "constant")
    if target != "constant":
        values = sorted(norms.values())
        pick = {
            "max": values[-1],
            "min": values[0],
            "mean": sum(values) / len(values),
            "median": values[(len(values) - 1) // 2],
        }
        tau = pick[target]
    result = {task: tau / (norm + 1e-6) for task, norm in base.items()}
    return result if weighting.get("rescale") == "always" else {t: min(1.0, c) for t, c in result.items()}


def reference_run(
    weighting: dict, steps: int, micro_steps: dict[str, int], world: int, dtype: torch.dtype = torch.float64
) -> Reference:
    """Balanced SGD by hand on one process.

    Args:
        weighting: as in a run's `balancer:` block.
        steps: optimizer steps.
        micro_steps: task -> micro-steps.
        world: how many ranks' data each step takes.
        dtype: of forward and backward; sums, norms and master weights are float64 always.
    """
    model = make_model().to(dtype)  # engines round the weights first, then copy them to fp32
    master = {name: p.detach().double() for name, p in model.named_parameters()}
    norms_log, scales_log = [], []
    for step in range(steps):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(master[name])
        found = {task: gradients(model, task, step, micro_steps[task], world) for task in TASKS}
        norms = {t: _norm(v for n, v in g.items() if n.startswith("backbone.")) for t, g in found.items()}
        whole = {t: _norm(g.values()) for t, g in found.items()}
        scale = factors(weighting, norms, whole)
        total: dict[str, Tensor] = {}
        for task, gradient in found.items():
            for name, value in gradient.items():
                keep_raw = weighting.get("heads") == "none" and not name.startswith("backbone.")
                total[name] = total.get(name, 0) + value * (1.0 if keep_raw else scale[task])
        if weighting["name"] == "global_clip":
            last = min(1.0, weighting["max_norm"] / (_norm(total.values()) + 1e-6))
            total = {name: value * last for name, value in total.items()}
            scale = {task: c * last for task, c in scale.items()}
        for name, value in total.items():
            master[name] = master[name] - rate(weighting) * value
        norms_log.append(norms)
        scales_log.append(scale)
    return Reference(master, norms_log, scales_log)


def _norm(values) -> float:
    return float(torch.stack([v.double().square().sum() for v in values]).sum().sqrt())
