"""Metrics of an evaluation, nested by task, and the flat names they have in logs. Quick to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINED_PREFIX, AVERAGED_PREFIX = "eval", "eval_ema"
"""Prefixes of flat names: metrics of the trained weights, and of their average (`ema_decay`)."""
COUNTS = ("samples", "broken")
"""Values of a task that count images; all its other values are metrics."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation.

    Attributes:
        tasks: task -> name -> value: metrics, `samples` (images evaluated) and, if any, `broken` (unreadable images).
        score: mean of the tasks' main metrics; None when no task was evaluated.

    Example:
        >>> Evaluation({"det": {"map50": 0.5, "samples": 9}}, score=0.5).metrics("det")
        {'map50': 0.5}
    """

    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    score: float | None = None

    def metrics(self, task: str) -> dict[str, float]:
        """Return a task's values without the counts of images."""
        return {name: value for name, value in self.tasks[task].items() if name not in COUNTS}


def flatten(evaluation: Evaluation, prefix: str = TRAINED_PREFIX) -> dict[str, float]:
    """Return the values under Trainer's flat names: PREFIX_TASK_METRIC, and PREFIX_score.

    Example:
        >>> flatten(Evaluation({"det": {"map50": 0.5}, "det_small": {"map50": 0.25}}, score=0.375))
        {'eval_det_map50': 0.5, 'eval_det_small_map50': 0.25, 'eval_score': 0.375}
    """
    flat = {
        f"{prefix}_{task}_{name}": value for task, values in evaluation.tasks.items() for name, value in values.items()
    }
    return flat if evaluation.score is None else {**flat, f"{prefix}_score": evaluation.score}


def nest(record: Mapping[str, Any], tasks: Iterable[str], prefix: str = TRAINED_PREFIX) -> Evaluation:
    """Return the evaluation that `flatten` wrote into a record, for example into a line of log.jsonl.

    A flat name belongs to the task with the longest name that fits.

    Args:
        record: flat names -> values; all other entries are ignored.
        tasks: names of the run's tasks.
        prefix: TRAINED_PREFIX or AVERAGED_PREFIX.

    Example:
        >>> nest({"eval_det_map50": 0.5, "eval_det_small_map50": 0.25}, ["det", "det_small"]).tasks
        {'det': {'map50': 0.5}, 'det_small': {'map50': 0.25}}
    """
    # both prefixes, since "eval_ema_" also begins the names of a task called "ema"
    names = list(tasks)
    owners = {f"{start}_{task}_": (start, task) for start in (AVERAGED_PREFIX, TRAINED_PREFIX) for task in names}
    starts = sorted(owners, key=len, reverse=True)
    summaries = {f"{start}_{name}" for start in (TRAINED_PREFIX, AVERAGED_PREFIX) for name in ("score", "runtime")}
    nested: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        start = next((start for start in starts if key.startswith(start)), None)
        if start is not None and owners[start][0] == prefix and key not in summaries and value is not None:
            nested.setdefault(owners[start][1], {})[key.removeprefix(start)] = value
    return Evaluation(nested, record.get(f"{prefix}_score"))


def labelled_metrics(record: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, float]:
    """Return the metrics of a flat record under names for tables and plots, the score last.

    Example:
        >>> labelled_metrics({"eval_det_map50": 0.5, "eval_ema_det_map50": 0.6, "eval_score": 0.5}, ["det"])
        {'det: map50': 0.5, 'det: map50, averaged weights': 0.6, 'score': 0.5}
    """
    names = list(tasks)
    labelled: dict[str, float] = {}
    for prefix, note in ((TRAINED_PREFIX, ""), (AVERAGED_PREFIX, ", averaged weights")):
        found = nest(record, names, prefix)
        labelled |= {f"{task}: {name}{note}": v for task in found.tasks for name, v in found.metrics(task).items()}
    score = record.get(f"{TRAINED_PREFIX}_score")
    return labelled if score is None else {**labelled, "score": score}
