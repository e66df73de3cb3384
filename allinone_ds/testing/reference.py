"""Balanced training of the toy model by hand, on one process in float64: what any engine on R ranks must reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allinone_ds.testing.toy import TASKS, ToyModel, inputs, make_model, rate


@dataclass
class SgdByHand:
    """SGD on whole parameters.

    Args:
        lr: learning rate.
        head_lr: of the heads, where it differs.
    """

    lr: float
    head_lr: float | None = None

    def step(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights after a step."""
        rates = {n: self.lr if n.startswith("backbone.") or self.head_lr is None else self.head_lr for n in weights}
        return {name: value - rates[name] * gradients.get(name, 0) for name, value in weights.items()}


class ByTorch:
    """An optimizer of torch on whole parameters in float64.

    Args:
        make: called once with the list of parameters.
    """

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]):
        self._make = make
        self._params: dict[str, torch.nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def step(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights after a step; those without a gradient get zeros."""
        if self._optimizer is None:
            self._params = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
            self._optimizer = self._make(list(self._params.values()))
        for name, param in self._params.items():
            param.grad = gradients.get(name, torch.zeros_like(param))
        self._optimizer.step()
        return {name: param.detach().clone() for name, param in self._params.items()}


@dataclass
class Reference:
    """What training must reach: final parameters, and per step the raw norms and factors of each task."""

    params: dict[str, Tensor]
    norms: list[dict[str, float]]
    scales: list[dict[str, float]]


def gradients(
    model: ToyModel, task: str, step: int, micro_steps: int, world: int, data: str | None = None
) -> dict[str, Tensor]:
    """A task's gradient, mean over all ranks' micro-batches (those of `data`); parameters not reached are absent."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    for micro_step in range(micro_steps):
        for rank in range(world):
            x = inputs(data or task, step, micro_step, rank).to(next(model.parameters()).dtype)
            loss = model(task, x, micro_step == micro_steps - 1) / (micro_steps * world)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] = total.get(name, 0) + gradient.double()
    return total


def balanced_at_features(
    model: ToyModel, tasks: Sequence[str], weighting: Mapping[str, Any], step: int, micro_steps: int, world: int
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Return the gradient of tasks on one batch, balanced at the features in each micro-step, with norms and factors.

    Args:
        model: the model.
        tasks: names; all read the features of the micro-batches of the first.
        weighting: as in a run's `balancer:` block.
        step: number of the step.
        micro_steps: of one rank.
        world: how many ranks' data the step takes.
    """
    backbone = {f"backbone.{n}": p for n, p in model.backbone.named_parameters() if p.requires_grad}
    heads = {n: p for n, p in model.named_parameters() if not n.startswith("backbone.")}
    total: dict[str, Tensor] = {}
    norms, scales = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)

    def add(names: Iterable[str], found: Sequence[Tensor | None]) -> None:
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0) + gradient.double() / micro_steps

    for k in range(micro_steps):
        dtype = next(model.parameters()).dtype
        features = [model.backbone(inputs(tasks[0], step, k, rank).to(dtype)) for rank in range(world)]
        read = [tensor.detach().requires_grad_() for tensor in features]
        rows = {}
        for task in tasks:
            loss = torch.stack([model.loss(task, tensor, k == micro_steps - 1) for tensor in read]).mean()
            found = torch.autograd.grad(loss, [*read, *heads.values()], allow_unused=True)
            rows[task] = [gradient.double() for gradient in found[:world]]
            add(heads, found[world:])
        own = {task: norm_of(row) for task, row in rows.items()}
        scale = factors(weighting, own, own)
        sums = [torch.stack([scale[t] * rows[t][rank] for t in tasks]).sum(0).to(dtype) for rank in range(world)]
        add(backbone, torch.autograd.grad(features, list(backbone.values()), sums, allow_unused=True))
        norms = {task: norms[task] + own[task] / micro_steps for task in tasks}
        scales = {task: scales[task] + scale[task] / micro_steps for task in tasks}
    return total, norms, scales


def factors(weighting: Mapping[str, Any], norms: dict[str, float], whole: dict[str, float]) -> dict[str, float]:
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
    weighting: Mapping[str, Any],
    steps: int,
    micro_steps: Mapping[str, int],
    world: int,
    dtype: torch.dtype = torch.float64,
    *,
    model: ToyModel | None = None,
    lr: float | None = None,
    head_lr: float | None = None,
    delayed: bool = False,
    joint: bool = False,
    at: str = "backbone",
    optimizer: Any = None,
) -> Reference:
    """Train with balanced SGD by hand, on one process.

    Args:
        weighting: as in a run's `balancer:` block.
        steps: optimizer steps.
        micro_steps: task -> micro-steps of one rank.
        world: how many ranks' data each step takes.
        dtype: of forward and backward; sums, norms and master weights are float64 always.
        model: to start from; it is trained in place. None: `make_model()`.
        lr: learning rate; None: `rate(weighting)`.
        head_lr: of the heads, where it differs.
        delayed: factors come from the step before, as with norm="delayed"; the first step is exact.
        joint: all tasks read the data of the first.
        at: "backbone", or "features": balanced there in each micro-step, heads with their raw gradient.
        optimizer: with `step(weights, gradients)`, which returns the weights after a step; None: SGD.
    """
    optimizer = optimizer or SgdByHand(rate(weighting) if lr is None else lr, head_lr)
    # engines round the weights first, then copy them to fp32
    model = (make_model() if model is None else model).to(dtype)
    master = {name: p.detach().double() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own: dict[str, float] = {}
    norms_log, scales_log = [], []
    total: dict[str, Any]
    norms: dict[str, float]
    scale: dict[str, float]
    for step in range(steps):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(master[name])
        if at == "features":
            total, norms, scale = {}, {}, {}
            for tasks in [TASKS] if joint else [(task,) for task in TASKS]:
                part = balanced_at_features(model, tasks, weighting, step, micro_steps[tasks[0]], world)
                total = {name: total.get(name, 0) + part[0].get(name, 0) for name in {**total, **part[0]}}
                norms, scale = {**norms, **part[1]}, {**scale, **part[2]}
            master |= optimizer.step({name: master[name] for name in trained}, total)
            norms_log.append(norms)
            scales_log.append(scale)
            continue
        data = TASKS[0] if joint else None
        found = {task: gradients(model, task, step, micro_steps[task], world, data) for task in TASKS}
        norms = {t: norm_of(v for n, v in g.items() if n.startswith("backbone.")) for t, g in found.items()}
        whole = {t: norm_of(g.values()) for t, g in found.items()}
        earlier, own = own, factors(weighting, norms, whole)
        scale = earlier if delayed and earlier else own
        total = {}
        for task, gradient in found.items():
            for name, value in gradient.items():
                keep_raw = weighting.get("heads") == "none" and not name.startswith("backbone.")
                total[name] = total.get(name, 0) + value * (1.0 if keep_raw else scale[task])
        if weighting["name"] == "global_clip":
            last = min(1.0, weighting["max_norm"] / (norm_of(total.values()) + 1e-6))
            total = {name: value * last for name, value in total.items()}
            scale = {task: c * last for task, c in scale.items()}
        master |= optimizer.step({name: master[name] for name in trained}, total)
        norms_log.append(norms)
        scales_log.append(scale)
    return Reference(master, norms_log, scales_log)


def norm_of(values: Iterable[Tensor]) -> float:
    """Return the norm of the concatenation of tensors."""
    return float(torch.stack([v.double().square().sum() for v in values]).sum().sqrt())
