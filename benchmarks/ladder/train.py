"""One run of the ladder: `allinone_ds.train` with methods and measurements that the package does not have.

`tbgc_own_heads` clips each head by the norm of its own gradient. `equal_updates` gives the tasks' gradients equal norms
in the metric of AdamW, || g_t / (sqrt(v) + eps) ||, where v is the optimizer's average of squared gradients, by whose
root AdamW divides.

With --updates, FILE gets the tasks' parts of the update of the backbone, one line per step: `squared` is a task's part
of the sum of the parts' squared norms, `along` the part's length in the direction of the update, in units of it (these
add up to 1), and `difference` the relative difference between the sum of the parts and the step that AdamW took.

The norms and parts are of one process with ZeRO 1 or 2, which holds all of the gradient.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import allinone_ds.train
import allinone_ds.training.trainer as trainer
from allinone_ds import TBGC, StepRecord, TaskBalancer, Weighting
from allinone_ds.balance.options import WEIGHTINGS
from allinone_ds.balance.weightings.base import EPS
from allinone_ds.zero.engines.pieces import cut


class OwnHeads(TBGC):
    """TBGC of the backbone, and each head clipped to `max_norm` by the norm of its own gradient."""

    def __init__(self, max_norm: float = 0.1):
        super().__init__(max_norm, heads="none")


class EqualUpdates(Weighting):
    """Give the tasks' gradients equal norms in the metric of AdamW, and their scaled norms a constant sum of squares.

    The first step, before AdamW has a metric, makes the norms themselves equal.

    Args:
        total: root of the sum of squares.
    """

    streams = False

    def __init__(self, total: float = 0.1):
        self.total = total
        self.measured: dict[str, Tensor] = {}  # task -> norm of its gradient in AdamW's metric

    def factors(self, record: StepRecord) -> Tensor:
        norms = record.norms
        measured = torch.stack([self.measured.get(task, norm) for task, norm in zip(record.tasks, norms, strict=True)])
        inverse = 1 / (measured.to(norms) + EPS)
        return inverse * self.total / ((norms * inverse).norm() + EPS)


WEIGHTINGS |= {"tbgc_own_heads": OwnHeads, "equal_updates": EqualUpdates}


class MeasuringBalancer(TaskBalancer):
    """A balancer that looks at the tasks' gradients, and at what AdamW makes of them."""

    updates: Path | None = None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._gradients: dict[str, list[Tensor]] = {}  # task -> its gradient on the backbone
        self._averages: dict[str, list[Tensor]] = {}  # task -> its part of AdamW's average of gradients
        self._measure, self._combiner._measure = self._combiner._measure, self._look  # type: ignore[method-assign]

    def step(self, require_all: bool = True) -> Any:
        """Take a step and measure every task's part of it."""
        before = [master.clone() for master in self._adapter.masters()] if self.updates is not None else []
        report = super().step(require_all)
        if self.updates is not None:
            self._measure_parts({task: float(scale) for task, scale in report.scales.items()}, before)
        self._gradients = {}
        return report

    def _look(self, task: str, pieces: list[Tensor], *rest: Any) -> Any:
        shared, other = self._combiner._split(pieces)
        if isinstance(self.weighting, EqualUpdates):
            state = self._state("exp_avg_sq")
            if state is not None:
                self.weighting.measured[task] = _norm(self._divide(shared, state))
        measured = self._measure(task, pieces, *rest)
        if isinstance(self.weighting, OwnHeads):
            factor = (self.weighting.max_norm / (_norm(other) + EPS)).clamp(max=1.0)
            for piece in other:
                piece.mul_(factor)
        if self.updates is not None:
            self._gradients[task] = [piece.clone() for piece in shared]
        return measured

    def _state(self, name: str) -> list[Tensor] | None:
        """Return a state of the optimizer for the pieces of the backbone; None before the first step."""
        optimizer = self._adapter.optimizer.optimizer
        states = [optimizer.state[master].get(name) for master in self._adapter.masters()]
        if any(state is None for state in states):
            return None
        return self._combiner._split(cut(states, self._adapter.pieces))[0]

    def _divide(self, pieces: list[Tensor], squares: list[Tensor]) -> list[Tensor]:
        """Return pieces / (sqrt(v) + eps), with v corrected for its start from zero."""
        group = self._adapter.optimizer.optimizer.param_groups[0]
        corrected = 1 - group["betas"][1] ** self._step_count()
        found = zip(pieces, squares, strict=True)
        return [piece / ((square / corrected).sqrt() + group["eps"]) for piece, square in found]

    def _step_count(self) -> float:
        optimizer = self._adapter.optimizer.optimizer
        return float(optimizer.state[self._adapter.masters()[0]]["step"])

    def _taken(self, before: list[Tensor]) -> Tensor:
        """Return the update of the backbone that AdamW took, without learning rate and weight decay, (N,)."""
        changes = []
        groups = self._adapter.optimizer.optimizer.param_groups
        for group, old, new in zip(groups, before, self._adapter.masters(), strict=True):
            changes.append((old * (1 - group["lr"] * group["weight_decay"]) - new) / group["lr"])
        return torch.cat([piece.flatten() for piece in self._combiner._split(cut(changes, self._adapter.pieces))[0]])

    def _measure_parts(self, scales: dict[str, float], before: list[Tensor]) -> None:
        squares = self._state("exp_avg_sq")
        if squares is None:
            return
        group = self._adapter.optimizer.optimizer.param_groups[0]
        first, corrected = group["betas"][0], 1 - group["betas"][0] ** self._step_count()
        for task, pieces in self._gradients.items():
            averages = self._averages.setdefault(task, [torch.zeros_like(piece) for piece in pieces])
            for average, piece in zip(averages, pieces, strict=True):
                average.mul_(first).add_(piece, alpha=(1 - first) * scales[task])
        if not group["lr"]:  # the first step of a warm-up moves nothing
            return
        parts = {
            task: torch.cat([part.flatten() / corrected for part in self._divide(averages, squares)]).double()
            for task, averages in self._averages.items()
        }
        update = torch.stack(list(parts.values())).sum(0)
        whole, squared = update.square().sum(), sum(part.square().sum() for part in parts.values())
        measured = {
            "along": {task: float((part * update).sum() / whole) for task, part in parts.items()},
            "squared": {task: float(part.square().sum() / squared) for task, part in parts.items()},
            "difference": {"sum": float((update - self._taken(before).double()).norm() / whole.sqrt())},
        }
        assert self.updates is not None
        with self.updates.open("a") as file:
            file.write(json.dumps(measured) + "\n")


def _norm(pieces: list[Tensor]) -> Tensor:
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum().sqrt().float()


def train() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="YAML file of the run")
    parser.add_argument("--updates", type=Path, help="file for the tasks' parts of the update")
    args = parser.parse_args()
    MeasuringBalancer.updates = args.updates
    trainer.TaskBalancer = MeasuringBalancer  # type: ignore[misc]
    return allinone_ds.train.main([args.run])
