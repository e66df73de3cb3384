"""The parameter groups of a checkpoint, and its schedule for the groups of a run with other tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allinone_ds.balance.renaming import Names
from allinone_ds.training.save_checkpoint import loop_file
from allinone_ds.zero.checkpoint.layout import read_file


def saved_groups_of(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return what `settings_by_name` returned when the checkpoint was saved; nothing of an earlier release."""
    file = checkpoint / loop_file(0)
    return read_file(file).get("groups", {}) if file.is_file() else {}


def schedule_for_groups(
    saved: Mapping[str, Any], names: Names, checkpoint: Path, groups: Sequence[str], rates: Sequence[float]
) -> dict[str, Any]:
    """Return the state of a schedule for the parameter groups of other tasks.

    A new group has its rate of this run, and the reductions so far of the groups of the checkpoint.

    Args:
        saved: state of the schedule.
        names: {task of the checkpoint: its name in this run, None where it does not go on}.
        checkpoint: folder of the checkpoint.
        groups: names of this run's groups.
        rates: their learning rates at the start of the schedule.
    """
    places: dict[str, int] = {}
    for place, group in enumerate(saved_groups_of(checkpoint)):
        kind, _, rest = group.partition("/")
        task, _, decay = rest.partition("/")
        places["/".join([kind, str(names.get(task, task)), decay]) if kind == "head" else group] = place
    before, last = saved.get("base_lrs", []), saved.get("_last_lr", [])
    reduction = last[-1] / before[-1] if before and last and before[-1] else 1.0
    changed = dict(saved)
    for key, values in saved.items():
        if isinstance(values, list) and len(values) == len(places):
            new = [rate * reduction if key == "_last_lr" else rate for rate in rates]
            if key not in ("base_lrs", "_last_lr"):
                new = [values[-1]] * len(groups)
            changed[key] = [values[places[g]] if g in places else new[i] for i, g in enumerate(groups)]
    return changed
