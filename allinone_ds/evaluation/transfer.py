"""Gain of multi-task runs over single-task models. Quick to import.

The gain of a metric is its change relative to the single-task baseline, with the sign turned where smaller values are
better. The gain of a task is the mean over its metrics and Delta m the mean over tasks, as LibMTL (arXiv 2203.14338),
FAMO and FairGrad report it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allinone_ds.run_folder.names import TRANSFER_FILE


@dataclass(frozen=True)
class MetricGain:
    """One metric of one task: the baseline, and the value and gain of each run.

    Example:
        >>> MetricGain("depth", "rmse", greater_is_better=False, baseline=0.5, values=[0.25]).gains
        [50.0]
    """

    task: str
    metric: str
    greater_is_better: bool
    baseline: float
    """Value of the single-task model."""
    values: list[float]
    """Value of each run."""

    @property
    def gains(self) -> list[float | None]:
        """Gain of each run in percent of the baseline, positive where the run is better; None where the baseline is 0
        or a value is missing (NaN)."""
        sign = 1 if self.greater_is_better else -1
        return [
            None if self.baseline == 0 or math.isnan(value - self.baseline)
            else sign * 100 * (value - self.baseline) / abs(self.baseline)
            for value in self.values
        ]  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """Comparison of one or several multi-task runs with the single-task baselines of the first one.

    Example:
        >>> miou = MetricGain("seg", "miou", greater_is_better=True, baseline=0.5, values=[0.6, 0.4])
        >>> rmse = MetricGain("depth", "rmse", greater_is_better=False, baseline=1.0, values=[1.1, 1.0])
        >>> transfer = Transfer(["tbgc", "sum"], [miou, rmse])
        >>> [round(gain, 6) for gain in transfer.mean_gains], transfer.mean_ranks, transfer.worse(0)
        ([5.0, -10.0], [1.5, 1.5], ['depth'])
    """

    runs: list[str]
    """Name of each run."""
    rows: list[MetricGain]
    """One entry per task and metric whose direction is known."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the numbers should know."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are compared."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def task_gain(self, task: str, run: int) -> float | None:
        """Return the mean gain over the metrics of a task in percent; None if none of them is defined."""
        return _mean([row.gains[run] for row in self.rows if row.task == task])

    @property
    def mean_gains(self) -> list[float | None]:
        """Delta m of each run in percent: the mean of its tasks' gains."""
        return [_mean([self.task_gain(task, run) for task in self.tasks]) for run in range(len(self.runs))]

    @property
    def mean_ranks(self) -> list[float]:
        """Mean rank of each run over all metrics, 1 is best; runs with equal values share the mean of their ranks."""
        ranks = [_ranks(row) for row in self.rows]
        return [sum(of_metric[run] for of_metric in ranks) / len(ranks) for run in range(len(self.runs))]

    def worse(self, run: int) -> list[str]:
        """Return the tasks that a run solves worse than their single-task models."""
        return [task for task in self.tasks if (self.task_gain(task, run) or 0.0) < 0]


def read_transfer(folder: Path) -> Transfer | None:
    """Return the comparison that `compare_runs` wrote to a run's folder; None if there is none."""
    file = folder / TRANSFER_FILE
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    return Transfer(record["runs"], [MetricGain(**row) for row in record["rows"]], record["notes"])


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _ranks(row: MetricGain) -> list[float]:
    """Return the rank of each run in one metric, 1 is best; a missing value is last."""
    sign = -1 if row.greater_is_better else 1
    keys = [math.inf if math.isnan(value) else sign * value for value in row.values]
    return [sum(other < key for other in keys) + (1 + sum(other == key for other in keys)) / 2 for key in keys]
