"""Weightings without memory: the plain sum, fixed weights, and clips of the sum, of each task and of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from allinone_ds.balance.weightings.base import EPS, StepRecord, Weighting
from allinone_ds.device_constants import constant
from allinone_ds.strict import did_you_mean


class Sum(Weighting):
    """Plain sum of the tasks' gradients: every factor is 1. First rung of the ladder in arXiv 2307.03465.

    Example:
        >>> from allinone_ds import Sum
        >>> Sum()
        Sum()
    """

    batched = True

    def factors(self, record: StepRecord) -> Tensor:
        return torch.ones_like(record.whole_norms)

    def __repr__(self) -> str:
        return "Sum()"


class Static(Weighting):
    """Fixed weights: the factor of task t is weights[t], as if its loss were multiplied by it.

    Args:
        weights: task -> factor above 0, one for every task.

    Raises:
        ValueError: a weight that is not a finite number above 0, or no weights.

    Example:
        >>> from allinone_ds import Static
        >>> Static({"det": 1.0, "seg": 0.25})
        Static(weights={'det': 1.0, 'seg': 0.25})
    """

    batched = True

    def __init__(self, weights: Mapping[str, float]):
        good = isinstance(weights, Mapping) and all(0 < float(weight) < math.inf for weight in weights.values())
        if not good or not weights:
            raise ValueError(f"Static: weights = {weights!r}; allowed: a finite number above 0 for every task, by name")
        self.weights = {task: float(weight) for task, weight in weights.items()}

    def check_tasks(self, tasks: tuple[str, ...]) -> None:
        missing = [task for task in tasks if task not in self.weights]
        if missing:
            known = ", ".join(self.weights)
            raise ValueError(f"Static: no weight for task '{missing[0]}'; weights has {known}: give one to every task")
        for task in self.weights:
            if task not in tasks:
                raise ValueError(f"Static: a weight for the unknown task '{task}'; {did_you_mean(task, tasks)}")

    def factors(self, record: StepRecord) -> Tensor:
        return constant([self.weights[task] for task in record.tasks], record.whole_norms, record.whole_norms.dtype)

    def __repr__(self) -> str:
        return f"Static(weights={self.weights})"


class GlobalClip(Sum):
    """One clip after the sum: g = min(1, max_norm / ||sum_t g_t||) * sum_t g_t, with the norm over all parameters.

    The baseline of the challenge (`ClipGradByGlobalNorm`).

    Args:
        max_norm: largest norm of the summed gradient.

    Example:
        >>> import torch
        >>> from allinone_ds import GlobalClip
        >>> GlobalClip(max_norm=0.5).sum_factor(torch.tensor(2.0))
        tensor(0.2500)
    """

    def __init__(self, max_norm: float = 0.1):
        self.max_norm = _positive("GlobalClip", max_norm)

    def sum_factor(self, whole_norm: Tensor) -> Tensor:
        return _clip(self.max_norm, whole_norm)

    def __repr__(self) -> str:
        return f"GlobalClip(max_norm={self.max_norm})"


class TaskClip(Weighting):
    """Clip each task by its whole norm, head included: c_t = min(1, max_norm / N_t).

    Args:
        max_norm: largest norm of a task's gradient.

    Example:
        >>> import torch
        >>> from allinone_ds import StepRecord, TaskClip
        >>> record = StepRecord(("det",), gram=torch.ones(1, 1), whole_norms=torch.tensor([2.0]), losses=torch.ones(1))
        >>> TaskClip(max_norm=0.5).factors(record)
        tensor([0.2500])
    """

    def __init__(self, max_norm: float = 0.1):
        self.max_norm = _positive("TaskClip", max_norm)

    def factors(self, record: StepRecord) -> Tensor:
        return _clip(self.max_norm, record.whole_norms)

    def __repr__(self) -> str:
        return f"TaskClip(max_norm={self.max_norm})"


class TBGC(Weighting):
    """Task-level backbone-oriented gradient clip (arXiv 2307.03465): c_t = min(1, target / (n_t + 1e-6)).

    n_t is the norm of task t's gradient restricted to the shared backbone; c_t multiplies all of task t's gradient.

    Args:
        max_norm: the target norm where `target` is "constant" (0.1 in the paper's winning entry).
        target: "constant", or "max", "mean", "median", "min" of the step's n_t (as in DB-MTL, arXiv 2308.12029).
            All but "constant" keep the gradient shards of all tasks until the step.
        rescale: "clip" never enlarges a gradient; "always" rescales to the target in both directions, except a gradient
            whose norm is below 1e-6, which has factor 1: it cannot be rescaled, and its head keeps its gradient.
        heads: "same": heads get the factor of their task too. "none": heads keep their raw gradient.

    Raises:
        ValueError: an option that is not one of the above, or options that would never scale a gradient.

    Example:
        >>> import torch
        >>> from allinone_ds import StepRecord, TBGC
        >>> record = StepRecord(("det",), gram=torch.tensor([[4.0]]), whole_norms=torch.ones(1), losses=torch.ones(1))
        >>> TBGC(max_norm=0.1).factors(record)
        tensor([0.0500])
    """

    batched = True

    TARGETS: Mapping[str, Callable[[Tensor], Tensor]] = {
        "max": torch.max, "mean": torch.mean, "median": torch.median, "min": torch.min,
    }  # fmt: skip

    def __init__(self, max_norm: float = 0.1, target: str = "constant", rescale: str = "clip", heads: str = "same"):
        self.max_norm = _positive("TBGC", max_norm)
        self.target = _one_of("TBGC", "target", target, ("constant", *self.TARGETS))
        self.rescale = _one_of("TBGC", "rescale", rescale, ("clip", "always"))
        self.heads = _one_of("TBGC", "heads", heads, ("same", "none"))
        self.streams = target == "constant"
        if math.isinf(self.max_norm) and self.streams and rescale == "always":
            raise ValueError("TBGC: max_norm is infinite; rescale='always' needs a finite target norm")
        if target == "max" and rescale == "clip":
            raise ValueError(
                "TBGC: target='max' with rescale='clip' never scales a gradient, since no norm is above the largest; "
                "use rescale='always', or target='mean', 'median', 'min' or 'constant'"
            )

    def factors(self, record: StepRecord) -> Tensor:
        norms = record.norms
        target = self.max_norm if self.streams else self.TARGETS[self.target](norms)
        factors = target / (norms + EPS)
        if self.rescale == "clip":
            return factors.clamp(max=1.0)
        return torch.where(norms > EPS, factors, torch.ones_like(factors))

    def __repr__(self) -> str:
        return f"TBGC(max_norm={self.max_norm}, target={self.target!r}, rescale={self.rescale!r}, heads={self.heads!r})"


def _clip(max_norm: float, norms: Tensor) -> Tensor:
    return (max_norm / (norms + EPS)).clamp(max=1.0)


def _positive(owner: str, max_norm: float) -> float:
    if not float(max_norm) > 0:
        raise ValueError(f"{owner}: max_norm = {max_norm!r}; allowed: a number above 0 (math.inf: never clip)")
    return float(max_norm)


def _one_of(owner: str, field: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{owner}: {field} = {value!r}; {did_you_mean(str(value), allowed)}")
    return value
