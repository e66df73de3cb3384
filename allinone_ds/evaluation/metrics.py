"""Metrics of an evaluation, nested by task, and the flat names they have in logs. Quick to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINED_PREFIX, AVERAGED_PREFIX = "eval", "eval_ema"
"""Prefixes of flat names: metrics of the trained weights, and of their average (`ema_decay`)."""
CLASS = "class/"
"""Beginning of the names of values of one class: class/CLASS/METRIC."""
MAX_LOGGED_CLASSES = 20
"""Classes up to which a task's logs have one value per class; with more, only metrics.json and the report have them."""
COUNTS = ("samples", "broken")
"""Values of a task that count images; all its other values are metrics."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation.

    Attributes:
        tasks: task -> name -> value: metrics, `samples` (images evaluated) and, if any, `broken` (unreadable images).
        score: mean of the tasks' main metrics; None when no task was evaluated.
        details: task -> what was found for each class, see `allinone_ds.tasks.details`.

    Example:
        >>> Evaluation({"det": {"map50": 0.5, "samples": 9}}, score=0.5).metrics("det")
        {'map50': 0.5}
    """

    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    score: float | None = None
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What the user should know about these numbers, one text per fact."""
        return [f"{task}: {note}" for task, found in self.details.items() for note in found.get("notes", [])]

    def metrics(self, task: str) -> dict[str, float]:
        """Return a task's values without the counts of images."""
        return {name: value for name, value in self.tasks[task].items() if name not in COUNTS}


def flatten(evaluation: Evaluation, prefix: str = TRAINED_PREFIX) -> dict[str, float]:
    """Return the values under Trainer's flat names: PREFIX_TASK_METRIC, and PREFIX_score.

    Up to `MAX_LOGGED_CLASSES` classes it also has PREFIX_TASK_class/CLASS/METRIC, for the first metric per class.

    Example:
        >>> flatten(Evaluation({"det": {"map50": 0.5}, "det_small": {"map50": 0.25}}, score=0.375))
        {'eval_det_map50': 0.5, 'eval_det_small_map50': 0.25, 'eval_score': 0.375}
    """
    flat = {
        f"{prefix}_{task}_{name}": value for task, values in evaluation.tasks.items() for name, value in values.items()
    }
    for task, found in evaluation.details.items():
        if "per_class" in found and len(found["classes"]) <= MAX_LOGGED_CLASSES:
            metric, column = next(iter(found["per_class"].items()))
            named = zip(found["classes"], column, strict=True)
            flat |= {f"{prefix}_{task}_{CLASS}{name}/{metric}": value for name, value in named if value is not None}
    return flat if evaluation.score is None else {**flat, f"{prefix}_score": evaluation.score}


def nest(record: Mapping[str, Any], tasks: Iterable[str], prefix: str = TRAINED_PREFIX) -> Evaluation:
    """Return the evaluation that `flatten` wrote into a record, for example into a line of log.jsonl.

    A flat name belongs to the task with the longest name that fits. Values per class are left out.

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
        if start is None or key in summaries or value is None or key.removeprefix(start).startswith(CLASS):
            continue
        if owners[start][0] == prefix:
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
