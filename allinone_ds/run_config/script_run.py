"""The configuration of a run that a Python script started, from the objects that the script gave to the Trainer."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from allinone_ds.balance.options import config_from_weighting
from allinone_ds.data.augmentation.transforms import SampleTransform, eval_transform
from allinone_ds.data.base import SourceConfig
from allinone_ds.data.loading.sampling import Sampling
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone
from allinone_ds.models.lora import adapters_of
from allinone_ds.run_config.arguments import SET_ELSEWHERE, AllInOneArguments, check_trainer_keys
from allinone_ds.run_config.build import without_checkpoint
from allinone_ds.run_config.optimizer_settings import default_optim
from allinone_ds.run_config.run_files import ModelFacts, RunFiles
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks import TASKS, Task

_DERIVED = ("use_cpu", "accelerator_config", "dataloader_pin_memory", "local_rank")
"""Arguments that Trainer sets itself, from the machine and from other arguments."""


def script_run_files(
    model: Any,
    args: AllInOneArguments,
    train_data: Mapping[str, TaskData],
    test_data: Mapping[str, TaskData],
    weighting: Any,
    balancer_options: Mapping[str, Any],
    sampling: Sampling | None = None,
) -> tuple[RunFiles | None, list[str]]:
    """Return what writes the run files of a script's run, and what these files cannot say.

    Args:
        model: an AllInOneModel.
        args: its training arguments.
        train_data: {task or joint group: training data}.
        test_data: {task or joint group: evaluation data}.
        weighting: weighting of the task gradients.
        balancer_options: further options of `TaskBalancer`.
        sampling: which tasks run in a step.

    Returns:
        None instead of the files if the model cannot be built again from them; and one sentence per gap.
    """
    if not isinstance(model.backbone, Backbone) or model.backbone.settings is None:
        return None, [
            "the backbone does not come from build_backbone, so that config.yaml and model.json are not written: "
            "`eval`, `export` and `load` cannot build the model"
        ]
    if adapters_of(model.backbone):
        return None, [
            "the backbone has adapters that no file of a run describes, so that config.yaml and model.json are not "
            "written: `eval`, `export` and `load` cannot build the model"
        ]
    gaps: list[str] = []
    roots = [opened[1] for data in train_data.values() if (opened := _opened_from(data)) is not None]
    root = Path(os.path.abspath(roots[0])) if roots else Path(".")
    tasks: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    group_of = {task: name for name, data in train_data.items() if data.joint for task in data.joint.tasks}
    for name, task in model.tasks.items():
        group = group_of.get(name, name)
        train, test = train_data[group], test_data.get(group)
        images = {
            "image_size": list(task.image_size),
            "batch_size": train.batch_size,
            "micro_steps": train.micro_steps,
            "cache": train.cache,
            "train": _source(train, root),
            "test": None if test is None else _test_source(test, task, root),
            "eval_batch_size": None if test is None else test.batch_size,
        }
        views = None if test is None else test.joint.test_time.get(name) if test.joint else test.test_time
        tasks[name] = {**_task(task), "test_time": None if views is None else views.model_dump()}
        if train.joint is None:
            tasks[name] |= {**images, "augment": _augment(train, name, gaps)}
        elif group not in groups:
            own = {"tasks": list(train.joint.tasks), "at": train.joint.at}
            groups[group] = {**images, **own, "augment": _augment(train, group, gaps)}
        if tasks[name]["type"].startswith("__main__:"):
            gaps.append(
                f"the class of task '{name}' is defined in the script itself: `eval`, `export` and `load` need it in a "
                "module of its own"
            )
    balancer = config_from_weighting(weighting)
    if balancer is None:
        gaps.append(f"config.yaml has the default weighting, since {weighting!r} is not one of the package")
    stages = dict(args.freeze_schedule or {})
    content = {
        "name": Path(str(args.output_dir)).name or "run",
        "output_dir": str(args.output_dir),
        "data_root": str(root),
        "model": {
            "backbone": without_checkpoint(model.backbone.settings, model.backbone.config).model_dump(),
            "freeze": stages.pop(0, None),
            "thaw": stages,
        },
        "tasks": tasks,
        "joint": groups,
        "balancer": {**(balancer or {}), **balancer_options},
        "sampling": None if sampling is None else sampling.model_dump(mode="json"),
        "trainer": _trainer(args),
        "deepspeed": args.deepspeed,
        "max_broken_images": args.max_broken_images,
    }
    try:
        json.dumps(content)
        config = RunConfig.model_validate(content)
    except (TypeError, ValidationError, ConfigError) as error:
        return None, [f"config.yaml and model.json are not written, `eval`, `export` and `load` need them: {error}"]
    classes = {name: list(task.classes) for name, task in model.tasks.items()}
    return RunFiles(config, ModelFacts(backbone=config.model.backbone, classes=classes)), gaps


def _task(task: Task) -> dict[str, Any]:
    """Return the keys of a task's configuration that its head has."""
    cls = type(task)
    names = [name for name, known in TASKS.items() if known is cls]
    options = task.options
    return {
        "type": names[0] if names else f"{cls.__module__}:{cls.__qualname__}",
        "head": task.head_name,
        "options": options.model_dump(exclude_defaults=True) if isinstance(options, BaseModel) else dict(options),
    }


def _opened_from(data: TaskData) -> tuple[SourceConfig, Path] | None:
    return getattr(data.dataset, "opened_from", None)  # a script may give any dataset of torch


def _source(data: TaskData, root: Path) -> dict[str, Any]:
    """Return the source that opens the data again, or one that says why none does."""
    opened = _opened_from(data)
    if opened is None:
        return _unknown(data, "it was not opened by allinone_ds.data.open_source")
    source, own_root = opened
    if Path(os.path.abspath(own_root)) != root:
        return _unknown(data, "its root folder is not that of the first task")
    return source.model_dump(mode="json", exclude_unset=True)


def _test_source(data: TaskData, task: Task, root: Path) -> dict[str, Any]:
    if repr(data.transform) != repr(eval_transform(task.image_size)):
        return _unknown(data, "its transform is not eval_transform(image_size)")
    return _source(data, root)


def _unknown(data: TaskData, reason: str) -> dict[str, Any]:
    cls = type(data.dataset)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return {"format": "script", "dataset": name, "samples": len(data.dataset), "reason": reason}


def _augment(data: TaskData, name: str, gaps: list[str]) -> Any:
    transform = data.transform
    if isinstance(transform, SampleTransform) and transform.augment is not None:
        return transform.augment.model_dump(mode="json")
    gaps.append(f"config.yaml does not hold the training transform of task '{name}', since train_transform made none")
    return []


def _trainer(args: AllInOneArguments) -> dict[str, Any]:
    """Return the arguments that are not the defaults, as far as a run's file may hold them."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        default = field.default_factory() if callable(field.default_factory) else field.default
        # the direction of the best metric follows from the metric, if the script does not choose it
        value = args.chosen_direction if field.name == "greater_is_better" else getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        if field.name == "optim" and value == default_optim(bool(args.use_cpu), args.deepspeed):
            continue  # what "auto" stands for here
        if value == default or (default in (None, "", "none") and not value):
            continue
        if not field.init or field.name in (*SET_ELSEWHERE, *_DERIVED) or "token" in field.name:
            continue
        try:
            settings.update(check_trainer_keys({field.name: json.loads(json.dumps(value))}))
        except (TypeError, ConfigError):
            continue  # no plain value
    return settings
