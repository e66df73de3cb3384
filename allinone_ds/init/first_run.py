"""Write the YAML file of a first run on folders of data."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from allinone_ds.data.combination import Split, combine
from allinone_ds.data.formats.common.listing import unused_by_both
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.init.found_task import FoundTask
from allinone_ds.init.groups import PlannedGroup, group_tasks, plan_group
from allinone_ds.init.recognise import recognise
from allinone_ds.init.run_file import SPLIT, PlannedTask, run_file
from allinone_ds.init.settings import Machine, input_size, machine_settings, small_objects, steps_for, typical_size
from allinone_ds.run_config.schema import load_config


@dataclass
class FirstRun:
    """What `write_first_run` wrote.

    Attributes:
        file: the YAML file.
        tasks: {name: task with its numbers}
        groups: {name: joint group of tasks that read one image set}
        problems: faults of the data that showed without decoding an image, as text.
    """

    file: Path
    tasks: dict[str, PlannedTask]
    groups: dict[str, PlannedGroup]
    problems: list[str]


def write_first_run(folders: Sequence[Path], output: Path, gpu: bool | None = None) -> FirstRun:
    """Look into folders of data and write the YAML file of a run that trains on all of them.

    Args:
        folders: one folder per data set, or a folder that contains several.
        output: the file to write; it must not exist.
        gpu: whether the run is for a machine with a GPU; None: whether this one has one.

    Raises:
        ConfigError: `output` exists or cannot be written, or two data sets have the same name.
        DataError: a folder holds nothing that is recognised, or data that cannot be opened.

    Example::

        first = write_first_run([Path("photos/signs"), Path("photos/cars")], Path("run.yaml"))
        sorted(first.tasks)                  # ['cars', 'signs']
    """
    if output.exists():
        raise ConfigError(f"{output} exists and is not overwritten; choose a different --output, or remove the file")
    gpu = torch.cuda.is_available() if gpu is None else gpu
    machine = machine_settings(gpu)
    resolved = [Path(os.path.abspath(folder)) for folder in folders]
    root = resolved[0] if len(resolved) == 1 else Path(os.path.commonpath([folder.parent for folder in resolved]))
    found: dict[str, FoundTask] = {}
    names: dict[str, str] = {}
    for folder in resolved:
        name = "" if folder == root else str(folder.relative_to(root))
        for task_name, task in recognise(folder, name).items():
            if task_name in found:
                raise ConfigError(f"two data sets give the task name '{task_name}'; rename one of their folders")
            for value in (str(root), *task.train.values(), *(task.test or {}).values()):
                _require_utf8(value)
            found[task_name] = task
            names[task_name] = task_name.removesuffix(f"_{task.kind}")
    tasks: dict[str, PlannedTask] = {}
    faults: dict[str, list[str]] = {}
    for task_name, task in found.items():
        tasks[task_name], faults[task_name] = _plan(task, root, machine)
    groups: dict[str, PlannedGroup] = {}
    for group, members in group_tasks(tasks, names).items():
        groups[group], faults[group] = plan_group(group, members, tasks, root)
        for member in members:
            del faults[member]
    problems = list(dict.fromkeys(fault for of_one in faults.values() for fault in of_one))
    units: dict[str, PlannedGroup | PlannedTask] = {**groups, **{t: task for t, task in tasks.items() if t in faults}}
    steps = max(steps_for(unit.samples[0], unit.batch_size, machine) for unit in units.values())
    name = re.sub(r"\W+", "_", output.stem).strip("_") if output.stem != "run" else "_".join(list(units)[:3])
    command = " ".join(
        ["allinone-ds init", *map(str, folders), *([] if output.name == "run.yaml" else ["--output", str(output)])]
    )
    text = run_file(name or "run", str(root), tasks, groups, machine, gpu, steps, command, str(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8, in comments
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}; choose a different file") from None
    try:
        load_config(output)
    except ConfigError:
        output.unlink()
        raise
    return FirstRun(output, tasks, groups, problems)


def _require_utf8(path: object) -> None:
    """Raise a `DataError` for a path that a YAML file cannot hold."""
    if isinstance(path, str) and path.encode("utf-8", "replace") != os.fsencode(path):
        raise DataError(f"{path!r}: the name is not UTF-8, which a YAML file cannot hold; rename the folder")


def _plan(task: FoundTask, root: Path, machine: Machine) -> tuple[PlannedTask, list[str]]:
    """Open the data of a task and return its numbers, and the faults that show without decoding an image."""
    train_source = TypeAdapter(Source).validate_python(task.train)
    if task.test is None:
        split = Split(**SPLIT)
        sources = combine(train_source, task.classes, split), combine(train_source, task.classes, split, "test")
    else:
        test_source = TypeAdapter(Source).validate_python(task.test)
        sources = combine(train_source, task.classes), combine(test_source, task.classes)
    try:
        train = open_source(sources[0], root, strict=False)
        test = open_source(sources[1], root, train.classes, strict=False)
    except DataError as error:
        raise DataError(f"the data is recognised as {task.layout}, but {error}", error.problems) from error
    size = typical_size(train)
    if size is None:
        raise DataError(f"{train.name}: is recognised as {task.layout}, but none of its images can be read")
    planned = PlannedTask(
        found=task,
        classes=train.classes,
        samples=(len(train), len(test)),
        typical=size,
        image_size=input_size(size, machine.sides[task.kind], machine.patch),
        batch_size=min(machine.batches[task.kind], len(train)),
    )
    if task.kind == "detection":
        task.notes += small_objects(train, planned.image_size)
    faults = dict.fromkeys(str(p) for part in unused_by_both(train.structural, test.structural) for p in part)
    return planned, list(faults)
