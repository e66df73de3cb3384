"""The tasks of a resumed run against those of its checkpoint: what goes on, what starts fresh, and what is dropped.

T tasks. A tensor of a head, or of a task's own adapters, that goes on is one of the checkpoint whose name differs in
the task alone. If the classes of a task differ, rows of tensors with one row per class go on for the classes that both
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from allinone_ds.errors import ConfigError
from allinone_ds.models.lora import in_any_task, in_task, name_without_lora, task_of
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.checkpoint.layout import Segment

Shapes = Mapping[str, tuple[int, ...]]
Continues = Mapping[str, str | Literal[False]]
"""{task: the task of the checkpoint with which it goes on, or False where it starts fresh}."""
_HEAD = "tasks.*."
"""Begin of what `in_any_task` returns of a head's tensors; those of adapters begin differently."""


@dataclass(frozen=True)
class SavedTasks:
    """What a checkpoint says of its tasks.

    Args:
        classes: {task: its class names}.
        continues: the `continues` of the run that wrote it, which it has carried out.
    """

    classes: Mapping[str, Sequence[str]]
    continues: Continues


@dataclass(frozen=True)
class TaskChanges:
    """How the tasks of a run differ from those of the checkpoint that it resumes.

    Args:
        names: {task of the checkpoint: its name in this run, or None where it does not go on}.
        segments: {tensor of this run: where its elements are in the checkpoint}; what no segment covers starts fresh.
        reclassed: tasks of this run that go on with other classes.
        lines: one text per task, for the user.
        parameters: names of the parameters of a checkpoint without ZeRO, as its optimizer numbers them.
    """

    names: Mapping[str, str | None]
    segments: Mapping[str, Sequence[Segment]]
    reclassed: tuple[str, ...]
    lines: tuple[str, ...]
    parameters: Sequence[str] | None = None


def task_changes(
    tasks: Mapping[str, Any], own: Shapes, saved: Shapes, before: SavedTasks, continues: Continues, where: Path
) -> TaskChanges | None:
    """Compare the tasks of a run with those of a checkpoint.

    Args:
        tasks: tasks of the run by name.
        own: shapes of the run's tensors by name.
        saved: shapes of the checkpoint's tensors by name.
        before: what the checkpoint says of its tasks.
        continues: `tasks.NAME.continues` of the run.
        where: the checkpoint, for messages.

    Returns:
        None if every task of the checkpoint goes on as it was, and there are no others.

    Raises:
        ConfigError: the checkpoint has no task that is to go on, several tasks claim one, a task could be a new name of
            one of the checkpoint, or a head that goes on differs in more than its classes.
    """
    sources = _sources(tasks, before, continues, where)
    removed = [name for name in before.classes if name not in sources.values()]
    fresh = [name for name in tasks if name not in sources]
    here, there = _by_task(own), _by_task(saved)
    _refuse_likely_names(tasks, here, there, before, continues, fresh, removed)
    segments: dict[str, Sequence[Segment]] = {}
    lines, reclassed = [], []
    for name, task in tasks.items():
        mine = here.get(name, {})
        if name in fresh:
            segments.update({in_task(key, name): () for key in mine})
            lines.append(f"task '{name}' is new: {_parts(mine)}, optimizer state and data start fresh")
            continue
        source = sources[name]
        theirs = there.get(source, {})
        old, new = list(before.classes[source]), list(task.classes)
        rows = {} if old == new else _class_tensors(task, len(old), mine, theirs, name, where)
        _refuse_other_head(name, source, mine, theirs, rows, where)
        moved: list[str] = []
        started: list[str] = []
        for key, shape in mine.items():
            if key not in rows:
                segments[in_task(key, name)] = (Segment(0, _numel(shape), in_task(key, source), 0),)
            else:
                found = _row_segments(old, new, shape, theirs.get(key), rows[key], in_task(key, source))
                segments[in_task(key, name)] = found
                (moved if found else started).append(_rest(key))
        text = f"task '{name}' goes on" + (f" as '{source}' of the checkpoint" if name != source else "")
        if old != new:
            reclassed.append(name)
            text += _class_text(old, new, moved, started)
        if name != source or old != new:
            lines.append(text)
    lines += [
        f"task '{name}' of the checkpoint is dropped, with {_parts(there.get(name, {}))} and optimizer state"
        for name in removed
    ]
    if not lines:
        return None
    segments.update(_renamed_base(own, saved))
    names: dict[str, str | None] = dict.fromkeys(before.classes)
    names.update({source: name for name, source in sources.items()})
    return TaskChanges(names, segments, tuple(reclassed), tuple(lines))


def _by_task(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return {task: {name of a tensor of its head or adapters, with "*" for the task: its shape}}."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        task = task_of(name)
        if task is not None:
            found.setdefault(task, {})[in_any_task(name)] = tuple(shape)
    return found


def _parts(tensors: Iterable[str]) -> str:
    return "its head" if all(key.startswith(_HEAD) for key in tensors) else "its head, adapters"


def _rest(key: str) -> str:
    return key.removeprefix(_HEAD)


def _renamed_base(own: Shapes, saved: Shapes) -> dict[str, Sequence[Segment]]:
    """Return where weights are in a checkpoint that has, or lacks, adapters beside them: `peft` then renames them."""
    theirs = {name_without_lora(name): name for name in saved if task_of(name) is None}
    return {
        name: (Segment(0, _numel(own[name]), theirs[plain], 0),)
        for name in own
        if task_of(name) is None and theirs.get(plain := name_without_lora(name), name) != name
    }


def _sources(tasks: Mapping[str, Any], before: SavedTasks, continues: Continues, where: Path) -> dict[str, str]:
    """Return {task: the task of the checkpoint that it goes on with}; fresh tasks are absent."""
    sources: dict[str, str] = {}
    for name in tasks:
        asked = continues.get(name)
        if asked is None or before.continues.get(name) == asked:  # the checkpoint has it under its new name already
            if name in before.classes:
                sources[name] = name
        elif asked is not False:
            if asked not in before.classes:
                raise ConfigError(
                    f"tasks.{name}.continues: {where} has no task '{asked}'; {did_you_mean(asked, before.classes)}"
                )
            sources[name] = asked
    for name, source in sources.items():
        twins = [other for other, its in sources.items() if its == source and other != name]
        if twins:
            unnamed = name if continues.get(name) is None else twins[0]
            raise ConfigError(
                f"the tasks {name} and {twins[0]} both go on with '{source}' of {where}; set tasks.{unnamed}.continues "
                "to a different task, or to false to start it fresh"
            )
    return sources


def _refuse_likely_names(
    tasks: Mapping[str, Any], here: Mapping[str, Shapes], there: Mapping[str, Shapes], before: SavedTasks,
    continues: Continues, fresh: Sequence[str], removed: Sequence[str],
) -> None:  # fmt: skip
    """Refuse a new task that may be a new name of a task that the run lacks: same classes and shapes."""
    for name in fresh:
        if name in continues:
            continue
        for old in removed:
            theirs = there.get(old, {})
            mine = {key: shape for key, shape in here.get(name, {}).items() if key in theirs}
            if theirs and mine == theirs and list(tasks[name].classes) == list(before.classes[old]):
                raise ConfigError(
                    f"task '{name}' is not in the checkpoint, and its task '{old}', which has the same head and "
                    f"classes, is not in the run: is it a new name? Set tasks.{name}.continues to {old}, or to false "
                    "to start it fresh"
                )


def _class_tensors(
    task: Any, before: int, mine: Shapes, theirs: Shapes, name: str, where: Path
) -> dict[str, int | None]:
    """Return the tensors of a head that depend on its classes.

    The head is built once more with one more class, on the meta device, to see which tensors grow.

    Returns:
        {name of a tensor: rows beside those of the classes; None where there is not one row per class}.
    """
    classes, head = list(task.classes), {key: shape for key, shape in mine.items() if key.startswith(_HEAD)}
    options = task.options.model_dump() if isinstance(task.options, BaseModel) else dict(task.options or {})
    try:
        with torch.device("meta"):
            larger = type(task)(
                task.name, [*classes, "one more"], task.channels, task.stride, task.num_levels, task.image_size,
                task.head_name, **options,
            )  # fmt: skip
        grown = {_HEAD + key: tuple(value.shape) for key, value in _tensors(larger).items()}
    except Exception as error:  # of options with one number per class, or of a class of the user's own
        if len(classes) == before:
            raise ConfigError(
                f"tasks.{name}: its classes differ from those in {where}, and which of its weights belong to which "
                f"class is not known ({type(error).__name__}: {error}); use the same classes, or set "
                f"tasks.{name}.continues to false to start it fresh"
            ) from error
        return {key: None for key, shape in head.items() if theirs.get(key) != shape}
    rows: dict[str, int | None] = {}
    for key, shape in head.items():
        larger_shape = grown.get(key)
        if larger_shape != shape:
            by_row = larger_shape is not None and larger_shape == (shape[0] + 1, *shape[1:])
            rows[key] = shape[0] - len(classes) if by_row and shape[0] >= len(classes) else None
    return rows


def _tensors(task: Any) -> dict[str, torch.Tensor]:
    return {**dict(task.named_parameters()), **dict(task.named_buffers())}


def _refuse_other_head(
    name: str, source: str, mine: Shapes, theirs: Shapes, rows: Mapping[str, int | None], where: Path
) -> None:
    for key in sorted({*mine, *theirs}, key=lambda key: (not key.startswith(_HEAD), key)):
        if key not in rows and mine.get(key) != theirs.get(key):
            there, here = theirs.get(key, "absent"), mine.get(key, "absent")
            what, keys = (
                ("a different head", "head and options") if key.startswith(_HEAD) else ("other adapters", "lora")
            )
            raise ConfigError(
                f"task '{name}' has {what} than '{source}' of {where}: {_rest(key)} is {there} in the checkpoint, "
                f"{here} in this run; use the same {keys}, or set tasks.{name}.continues to false to start it fresh"
            )


def _row_segments(
    old: Sequence[str], new: Sequence[str], shape: tuple[int, ...], there: tuple[int, ...] | None,
    extra: int | None, source: str,
) -> tuple[Segment, ...]:  # fmt: skip
    """Return where the rows of a tensor are for the classes that both have, and its rows beside those of classes."""
    if extra is None or there != (len(old) + extra, *shape[1:]):
        return ()
    size = _numel(shape[1:])
    pairs = [(row, old.index(label)) for row, label in enumerate(new) if label in old]
    pairs += [(len(new) + row, len(old) + row) for row in range(extra)]
    return tuple(Segment(row * size, size, source, before * size) for row, before in pairs)


def _class_text(old: Sequence[str], new: Sequence[str], moved: Sequence[str], started: Sequence[str]) -> str:
    both = [label for label in new if label in old]
    text = f" with {len(new)} classes (before: {len(old)}); the rows of {len(both)} classes that both have are kept"
    text += f" in {', '.join(moved)}" if moved else " nowhere"
    gone, added = [label for label in old if label not in new], [label for label in new if label not in old]
    for what, labels in (("start fresh", added), ("are dropped", gone)):
        if labels:
            text += f", those of {_few(labels)} {what}"
    return text + (f"; {_few(started)} start fresh" if started else "")


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
