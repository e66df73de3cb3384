"""All task kinds of the package, and how a task is built from its name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.tasks.base import Task
from allinone_ds.tasks.classification import ClassificationTask
from allinone_ds.tasks.dense.depth import DepthTask
from allinone_ds.tasks.dense.edges import EdgesTask
from allinone_ds.tasks.dense.normals import NormalsTask
from allinone_ds.tasks.dense.saliency import SaliencyTask
from allinone_ds.tasks.detection import DetectionTask
from allinone_ds.tasks.objects.instances import InstancesTask
from allinone_ds.tasks.objects.keypoints import KeypointsTask
from allinone_ds.tasks.segmentation import SegmentationTask
from allinone_ds.tasks.vectors.attributes import AttributesTask
from allinone_ds.tasks.vectors.regression import RegressionTask
from allinone_ds.tasks.vectors.retrieval import RetrievalTask

if TYPE_CHECKING:
    from allinone_ds.models.backbone import Backbone

TASKS: dict[str, type[Task]] = {
    "detection": DetectionTask,
    "segmentation": SegmentationTask,
    "classification": ClassificationTask,
    "depth": DepthTask,
    "normals": NormalsTask,
    "edges": EdgesTask,
    "saliency": SaliencyTask,
    "attributes": AttributesTask,
    "regression": RegressionTask,
    "retrieval": RetrievalTask,
    "keypoints": KeypointsTask,
    "instances": InstancesTask,
}
"""Class of each task kind. A new kind needs one more line here and nothing elsewhere in the package."""


def task_class(type_name: str) -> type[Task]:
    """Return the class of a task.

    Args:
        type_name: a key of `TASKS`, or "module:Class" for a class of your own.

    Raises:
        ConfigError: the task, module or class does not exist.

    Example:
        >>> task_class("detection").main_metric
        'map50'
        >>> task_class("allinone_ds.tasks.detection:DetectionTask") is task_class("detection")
        True
    """
    if type_name in TASKS:
        return TASKS[type_name]
    module, _, class_name = type_name.partition(":")
    if not class_name:
        raise ConfigError(
            f"task type '{type_name}' is unknown; {did_you_mean(type_name, TASKS)}, or 'module:Class' for your own"
        )
    try:
        cls = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        if module == "__main__":
            raise ConfigError(
                f"task type '{type_name}': the class was defined in the script that trained the run; move it to a "
                "module of its own on PYTHONPATH, and name it in the run's config.yaml as module:Class"
            ) from error
        raise ConfigError(f"task type '{type_name}': {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ConfigError(f"task type '{type_name}' is no subclass of allinone_ds.tasks.Task")
    return cls


def build_task(
    type_name: str,
    name: str,
    classes: Sequence[str],
    backbone: Backbone,
    image_size: tuple[int, int],
    head: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """Build a task for this backbone.

    Args:
        type_name: a key of `TASKS`, or "module:Class" for a class of your own.
        name: name of the task in the run.
        classes: class names by label.
        backbone: what `build_backbone` returned.
        image_size: (H, W) of the network's input in pixels.
        head: a head of this task; None selects the first.
        options: options of that head.

    Raises:
        ConfigError: the type, head or an option is unknown, or the backbone does not take images of this size.

    Example:
        >>> from allinone_ds.models.backbone import BackboneConfig, build_backbone
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        >>> backbone = build_backbone(BackboneConfig(config=sizes))
        >>> task = build_task("segmentation", "seg", ["road", "sky"], backbone, (32, 32), "light", {"width": 16})
        >>> task.name, task.head_name, task.options.width
        ('seg', 'light', 16)
    """
    arguments: dict[str, Any] = dict(options or {})
    if head is not None:
        arguments["head"] = head
    cls = task_class(type_name)
    if refusal := backbone.refuses((int(image_size[0]), int(image_size[1]))):
        raise ConfigError(f"tasks.{name}.image_size = {list(image_size)}: {refusal}")
    try:
        task = cls(name, classes, backbone.channels, backbone.stride, backbone.num_levels, image_size, **arguments)
    except ConfigError as error:  # of a head that knows no names of tasks
        where = "" if str(error).startswith(f"tasks.{name}") else f"tasks.{name}.options: "
        raise type(error)(f"{where}{error}") from error
    task.size_multiple = backbone.size_multiple
    return task
