"""What a balancer remembers of tasks, under the names that the tasks have in a later run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from allinone_ds.balance.weightings.per_task import resized_state

_V = TypeVar("_V")
Names = Mapping[str, str | None]
"""{task of the checkpoint: its name in this run, or None where it does not go on}; a task may be absent that keeps its
name."""


def by_new_name(values: Mapping[str, _V], names: Names) -> dict[str, _V]:
    """Return {task of this run: value} of {task of the checkpoint: value}, without the tasks that do not go on.

    Args:
        values: {task of the checkpoint: value}.
        names: see `Names`.

    Example:
        >>> by_new_name({"det": 1, "seg": 2, "cls": 3}, {"det": "boxes", "seg": None})
        {'boxes': 1, 'cls': 3}
    """
    return {new: value for old, value in values.items() if (new := names.get(old, old)) is not None}


def renamed_state(state: Mapping[str, Any], names: Names, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the state of a balancer for other tasks.

    Args:
        state: what `TaskBalancer.state_dict` returned.
        names: see `Names`.
        tasks: of this run, in their order.
    """
    before = list(state.get("tasks", tasks))  # checkpoints of earlier releases had the same tasks
    combiner = dict(state["combiner"])
    if "next" in combiner:
        combiner["next"] = by_new_name(combiner["next"], names)
    return {
        **state,
        "skipped_steps": by_new_name(state["skipped_steps"], names),
        "combiner": combiner,
        "weighting": _weighting(state["weighting"], before, names, tasks),
    }


def _weighting(state: Mapping[str, Any], before: Sequence[str], names: Names, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the memory of a weighting: values with names that end in /TASK, or that of a method of torchjd."""
    now = by_new_name({task: number for number, task in enumerate(before)}, names)
    kept = {}
    for key, value in state.items():
        what, slash, task = key.rpartition("/")
        if not slash:
            kept[key] = value
        elif names.get(task, task) in tasks:
            kept[f"{what}/{names.get(task, task)}"] = value
    rows = [now.get(task) for task in tasks]
    if rows == list(range(len(before))):
        return kept
    try:
        return resized_state(kept, rows, len(before))
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
