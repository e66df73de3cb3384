"""Tasks: one class a task, each with its head, loss, targets, metric and drawing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks.base import Prediction, Sample, Task
from allinone_ds.tasks.classification import ClassificationTask
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.segmentation import SegmentationTask

if TYPE_CHECKING:
    from allinone_ds.models.backbone import Backbone

TASKS: dict[str, type[Task]] = {
    "detection": DetectionTask,
    "segmentation": SegmentationTask,
    "classification": ClassificationTask,
}

__all__ = ["TASKS", "Prediction", "Sample", "Task", "build_task", "task_class"]


def task_class(type_name: str) -> type[Task]:
    """The class of a task: a key of `TASKS`, or your own as "module:Class".

    Raises:
        ConfigError: when there is no such task, module or class.
    """
    if type_name in TASKS:
        return TASKS[type_name]
    module, _, name = type_name.partition(":")
    if not name:
        raise ConfigError(
            f"task type '{type_name}' is unknown; {did_you_mean(type_name, TASKS)}, or your own as 'module:Class'"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task type '{type_name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task type '{type_name}' is no subclass of allinone_ds.tasks.Task")
    return found


def build_task(
    type_name: str,
    name: str,
    classes: Sequence[str],
    backbone: Backbone,
    image_size: tuple[int, int],
    head: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """A task on this backbone.

    Args:
        type_name: see `task_class`.
        name: name of the task in the run.
        classes: class names of its dataset.
        backbone: what `build_backbone` returned.
        image_size: (H, W) of the network's input, in pixels.
        head: which head; None takes the task's first.
        options: options of that head.

    Raises:
        ConfigError: for an unknown type, head or option, or a size that the backbone cannot take.
    """
    kwargs: dict[str, Any] = dict(options or {})
    if head is not None:
        kwargs["head"] = head
    cls = task_class(type_name)
    return cls(name, classes, backbone.channels, backbone.stride, backbone.num_levels, image_size, **kwargs)
