"""Tasks that read one image set, as joint groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from allinone_ds.data.base import Problem
from allinone_ds.data.combination import Split
from allinone_ds.data.joint.dataset import JointDataset
from allinone_ds.data.joint.sources import GroupSource, JointSource
from allinone_ds.data.sources import open_source
from allinone_ds.init.run_file import SPLIT, PlannedGroup, PlannedTask

_MISSING = "of the joint group have no label of it"  # in the message on images that lack a label
_COUNTED = "images have a label of it"  # in the warning that counts labels


def group_tasks(tasks: Mapping[str, PlannedTask], names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return {name of a group: its tasks} of the tasks whose train and test images lie in the same folders.

    Args:
        tasks: {name: task}
        names: {name of a task: the data set that it belongs to, a name for its group}
    """
    of_images: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, task in tasks.items():
        if task.found.images is not None:
            of_images[task.found.images].append(name)
    groups: dict[str, list[str]] = {}
    for members in of_images.values():
        if len(members) > 1:
            base = names[members[0]]
            taken = [base, *(f"{base}_{n}" for n in range(2, 100))]
            groups[next(n for n in taken if n not in tasks and n not in groups)] = members
    return groups


def plan_group(
    name: str, members: list[str], tasks: Mapping[str, PlannedTask], root: Path
) -> tuple[PlannedGroup, list[str]]:
    """Open the data of a joint group and return its numbers, and the faults that show without decoding an image.

    Args:
        name: name of the group.
        members: names of its tasks.
        tasks: {name: task}
        root: folder that relative paths start at.

    Raises:
        DataError: the data cannot be opened.
    """
    own = {task: tasks[task] for task in members}
    split = own[members[0]].found.test is None
    sources = {part: _source(own, part) for part in (("train",) if split else ("train", "test"))}
    problems: list[Problem] = []
    notes: list[str] = []
    classes: dict[str, list[str]] | None = None
    opened: dict[str, JointDataset] = {}
    for part in ("train", "test"):
        source = sources["train" if split else part]
        opened[part] = _open(name, own, source, root, part, split, classes)
        lacking = [p.reason.partition(" (first")[0] for p in opened[part].structural if _MISSING in p.reason]
        if lacking:
            source["partial"] = True
            notes += [f"{part}: {reason}" for reason in lacking]
            opened[part] = _open(name, own, source, root, part, split, classes)
        classes = classes or dict(opened[part].classes_of)
        problems += opened[part].structural
    planned = PlannedGroup(
        tasks=members,
        train=sources["train"],
        test=sources.get("test"),
        samples=(len(opened["train"]), len(opened["test"])),
        image_size=max(task.image_size for task in own.values()),
        batch_size=min(task.batch_size for task in own.values()),
        notes=notes,
    )
    return planned, list(dict.fromkeys(str(p) for p in problems if _COUNTED not in p.reason))


def _source(tasks: Mapping[str, PlannedTask], part: str) -> dict[str, Any]:
    """Return the joint source of the tasks' sources, which name the images no more."""
    given = {name: getattr(task.found, part) for name, task in tasks.items()}
    if all("images" not in source for source in given.values()):  # tar files, which hold the images
        return {"format": "joint", "labels": given}
    labels = {name: {k: v for k, v in source.items() if k != "images"} for name, source in given.items()}
    return {"format": "joint", "images": next(iter(given.values()))["images"], "labels": labels}


def _open(
    name: str, tasks: Mapping[str, PlannedTask], source: Any, root: Path, part: Any, split: bool, names: Any
) -> JointDataset:
    group = GroupSource(
        group=name,
        tasks=list(tasks),
        sources=[TypeAdapter(JointSource).validate_python(source)],
        classes={task: each.found.classes for task, each in tasks.items() if each.found.classes is not None},
        split=Split(**SPLIT) if split else None,
        part=part,
    )
    opened: Any = open_source(group, root, names, strict=False)  # type: ignore[arg-type]
    return opened
