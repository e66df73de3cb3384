"""Weightings that learn from step to step, from norms or from losses alone.

T tasks. Each keeps a few numbers per task, equal on all ranks, since norms and losses are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.weightings.base import EPS, StepRecord, Weighting
from allinone_ds.device_constants import copied_to


class _PerTask(Weighting):
    """Keeps float64 numbers by task name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = dict(state)

    def _get(self, record: StepRecord, name: str, default: Tensor) -> Tensor:
        """Return what is kept under `name` for the tasks of the record, (T,)."""
        rows = [self._kept.get(f"{name}/{task}", default[i]) for i, task in enumerate(record.tasks)]
        return torch.stack([row.to(default) for row in rows])

    def _put(self, record: StepRecord, name: str, values: Tensor, default: Tensor) -> None:
        """Keep (T,) values; a value that is not finite leaves the earlier one."""
        values = torch.where(torch.isfinite(values), values, self._get(record, name, default)).detach()
        self._kept.update({f"{name}/{task}": values[i].clone() for i, task in enumerate(record.tasks)})

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({options})"


class DBMTL(_PerTask):
    """DB-MTL (arXiv 2308.12029): the gradient of log(loss) of every task, rescaled to the largest of their norms.

    The gradient of log L_t is g_t / L_t with norm m_t = n_t / L_t; factors are max_s(m_s) / m_t / L_t. The paper
    averages gradients over steps (EMA); here the norms m_t are averaged, which needs no further memory. A task with a
    norm m_t below 1e-6 has factor 1 / L_t: there is no gradient to rescale, and its head must not grow with it.

    Args:
        beta: weight of the past in the average of norms, from 0 (none) to below 1.

    Example:
        >>> from allinone_ds import DBMTL
        >>> DBMTL(beta=0.9)
        DBMTL(beta=0.9)
    """

    streams = False

    def __init__(self, beta: float = 0.0):
        super().__init__()
        self.beta = _fraction("DBMTL", "beta", beta)

    def factors(self, record: StepRecord) -> Tensor:
        losses = record.losses.to(record.gram)
        now = record.norms / (losses + EPS)
        norms = self.beta * self._get(record, "norm", now) + (1 - self.beta) * now
        self._put(record, "norm", norms, now)
        scaled = torch.where(norms > EPS, norms.max() / (norms + EPS), torch.ones_like(norms))
        return scaled / (losses + EPS)


class GradNorm(_PerTask):
    """GradNorm (arXiv 1711.02257): learned weights; tasks whose loss falls more slowly get larger gradients.

    The target of w_t n_t is mean_s(w_s n_s) * r_t^alpha, where r_t is task t's loss divided by its first loss, divided
    by the mean of these ratios. Each step takes one step of gradient descent on the sum of |w_t n_t - target|, in units
    of the mean norm; then the weights are rescaled to sum to T (in a step without some tasks: to their earlier sum).

    Args:
        alpha: how strongly slower tasks are favoured; 0 makes all norms equal.
        lr: step size of the weights.

    Example:
        >>> from allinone_ds import GradNorm
        >>> GradNorm(alpha=0.5)
        GradNorm(alpha=0.5, lr=0.025)
    """

    streams = False

    def __init__(self, alpha: float = 1.5, lr: float = 0.025):
        super().__init__()
        self.alpha = _at_least_zero("GradNorm", "alpha", alpha)
        self.lr = _at_least_zero("GradNorm", "lr", lr)

    def factors(self, record: StepRecord) -> Tensor:
        norms, losses = record.norms, record.losses.to(record.gram)
        weights = self._get(record, "weight", torch.ones_like(norms))
        first = self._get(record, "first_loss", losses)
        self._put(record, "first_loss", first, losses)
        ratios = losses / (first + EPS)
        targets = (weights * norms).mean() * (ratios / (ratios.mean() + EPS)) ** self.alpha
        pull = torch.sign(weights * norms - targets) * norms
        moved = (weights - self.lr * pull / (norms.mean() + EPS)).clamp(min=EPS)
        moved = moved * weights.sum() / moved.sum()
        self._put(record, "weight", moved, weights)
        return moved


class Uncertainty(_PerTask):
    """Uncertainty weighting (arXiv 1705.07115): factors exp(-s_t), where s_t minimises exp(-s_t) L_t + s_t.

    Args:
        lr: step size of s_t.

    Example:
        >>> from allinone_ds import Uncertainty
        >>> Uncertainty(lr=0.01)
        Uncertainty(lr=0.01)
    """

    batched = True

    def __init__(self, lr: float = 0.025):
        super().__init__()
        self.lr = _at_least_zero("Uncertainty", "lr", lr)

    def factors(self, record: StepRecord) -> Tensor:
        losses = record.losses.double()
        s = self._get(record, "log_variance", torch.zeros_like(losses))
        factors = (-s).exp()
        self._put(record, "log_variance", s - self.lr * (1 - factors * losses), s)
        return factors


class DWA(_PerTask):
    """Dynamic weight average (arXiv 1803.10704): factors T softmax(L_t(now) / L_t(before) / temperature).

    The paper compares means over epochs. Here a short and a long exponential average over steps are compared.

    Args:
        temperature: above 1 brings the factors closer to each other.
        window: steps that the long average spans; the short one spans a tenth of it.

    Example:
        >>> from allinone_ds import DWA
        >>> DWA(window=500)
        DWA(temperature=2.0, window=500)
    """

    streams = False

    def __init__(self, temperature: float = 2.0, window: int = 1000):
        super().__init__()
        self.temperature = _above_zero("DWA", "temperature", temperature)
        self.window = int(_above_zero("DWA", "window", window))

    def factors(self, record: StepRecord) -> Tensor:
        losses = record.losses.to(record.gram)
        means = {}
        for name, span in (("short", max(self.window / 10, 1.0)), ("long", float(max(self.window, 1)))):
            before = self._get(record, name, losses)
            means[name] = before + (losses - before) / span
            self._put(record, name, means[name], before)
        return len(losses) * torch.softmax(means["short"] / (means["long"] + EPS) / self.temperature, dim=0)


class FAMO(_PerTask):
    """FAMO (arXiv 2306.03792): weights under which all losses fall at the same relative rate, from losses alone.

    With z = softmax(w), a step follows the gradient of c * sum_t z_t log(L_t): factors are c z_t / L_t, where c makes
    them add up to 1. Then Adam with weight decay moves w against softmax(w)^T (log L before - log L after), as in the
    authors' code. Their code evaluates the batch of the step again to learn the losses after it. Here the losses of the
    next step are used, on its own batches, which needs no further forward and adds the noise of the batches.

    Losses must be above 0; a loss below 1e-8 counts as 1e-8. A task that was absent is compared with its last loss; one
    without an earlier loss does not move the weights, and keeps its own.

    Args:
        lr: step size of w.
        gamma: weight decay of w.

    Example:
        >>> from allinone_ds import FAMO
        >>> FAMO(lr=0.05)
        FAMO(lr=0.05, gamma=0.001)
    """

    streams = False

    def __init__(self, lr: float = 0.025, gamma: float = 1e-3):
        super().__init__()
        self.lr = _at_least_zero("FAMO", "lr", lr)
        self.gamma = _at_least_zero("FAMO", "gamma", gamma)

    def factors(self, record: StepRecord) -> Tensor:
        losses = record.losses.to(record.gram).clamp(min=1e-8)
        seen = [row for row, task in enumerate(record.tasks) if f"loss/{task}" in self._kept]
        if len(seen) == len(record.tasks):
            self._learn(record, losses)
        elif seen:
            self._learn(replace(record, tasks=tuple(record.tasks[row] for row in seen)), losses[seen])
        z = torch.softmax(self._get(record, "logit", torch.zeros_like(losses)), dim=0)
        self._put(record, "loss", losses, losses)
        parts = z / losses
        return parts / parts.sum()

    def _learn(self, record: StepRecord, losses: Tensor) -> None:
        """Move w of the tasks of a record, all of which have an earlier loss."""
        zeros = torch.zeros_like(losses)
        w = self._get(record, "logit", zeros)
        z = torch.softmax(w, dim=0)
        delta = self._get(record, "loss", losses).log() - losses.log()
        gradient = z * (delta - (z * delta).sum()) + self.gamma * w
        count = self._get(record, "count", zeros) + 1
        mean = 0.9 * self._get(record, "mean", zeros) + 0.1 * gradient
        square = 0.999 * self._get(record, "square", zeros) + 0.001 * gradient.square()
        step = (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        for name, values in (("logit", w - self.lr * step), ("count", count), ("mean", mean), ("square", square)):
            self._put(record, name, values, zeros)


class RandomWeights(Weighting):
    """Random loss weighting (arXiv 2111.10603): factors T softmax(z), with a new standard normal z in every step.

    Args:
        seed: of the draws.

    Example:
        >>> from allinone_ds import RandomWeights
        >>> RandomWeights(seed=1)
        RandomWeights(seed=1)
    """

    streams = False

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def factors(self, record: StepRecord) -> Tensor:
        draws = torch.randn(len(record.tasks), generator=self._generator, dtype=torch.float64)
        return copied_to(len(draws) * torch.softmax(draws, dim=0), record.gram.device).to(record.gram.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())

    def __repr__(self) -> str:
        return f"RandomWeights(seed={self.seed})"


def _fraction(owner: str, field: str, value: float) -> float:
    if not 0 <= float(value) < 1:
        raise ValueError(f"{owner}: {field} = {value!r}; allowed: from 0 to below 1")
    return float(value)


def _at_least_zero(owner: str, field: str, value: float) -> float:
    if not float(value) >= 0:
        raise ValueError(f"{owner}: {field} = {value!r}; allowed: a number of 0 or more")
    return float(value)


def _above_zero(owner: str, field: str, value: float) -> float:
    if not float(value) > 0:
        raise ValueError(f"{owner}: {field} = {value!r}; allowed: a number above 0")
    return float(value)
