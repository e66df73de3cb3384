"""From a run's configuration to its model and data. Needs no DeepSpeed."""

from __future__ import annotations

from transformers import PreTrainedConfig

from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.loader import TaskData
from allinone_ds.data.sources import open_source
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks import build_task, task_class


def build_model(config: RunConfig, facts: ModelFacts) -> AllInOneModel:
    """The model of a run with fresh weights (or those of the backbone's checkpoint).

    Args:
        config: the run; only its tasks are read.
        facts: the backbone and the class names.
    """
    backbone = build_backbone(facts.backbone)
    tasks = {
        name: build_task(task.type, name, facts.classes[name], backbone, task.image_size, task.head, task.options)
        for name, task in config.tasks.items()
    }
    for name, task in config.tasks.items():  # now, not after the training
        if task.test_time is not None:
            tasks[name].check_test_time(task.test_time)
    return AllInOneModel(backbone, tasks)


def open_train_data(config: RunConfig) -> dict[str, TaskData]:
    """Training data by task.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    data = {}
    for name, task in config.tasks.items():
        dataset = open_source(task.train, config.data_root)
        data[name] = TaskData(
            dataset=dataset,
            transform=train_transform(task.augment, task.image_size, dataset.kind),
            collate=task_class(task.type).collate,
            batch_size=task.batch_size,
            micro_steps=task.micro_steps,
            cache=task.cache,
        )
    return data


def open_test_data(config: RunConfig, classes: dict[str, list[str]]) -> dict[str, TaskData]:
    """Test data of the tasks that have any, their class ids those of the training data.

    Args:
        config: the run.
        classes: class names of the training data by task.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    data = {}
    for name, task in config.tasks.items():
        if task.test is not None:
            data[name] = TaskData(
                dataset=open_source(task.test, config.data_root, classes=classes[name]),
                transform=eval_transform(task.image_size),
                collate=task_class(task.type).collate,
                batch_size=task.eval_batch_size or task.batch_size,
                cache=task.cache,
                test_time=task.test_time,
            )
    return data


def spelled_out(asked: BackboneConfig, built: PreTrainedConfig) -> BackboneConfig:
    """The backbone's configuration without its checkpoint: the sizes found there are written down instead."""
    if asked.checkpoint is None:
        return asked
    default = type(built)().to_dict()
    apart = (
        "out_indices",
        "out_features",
        "stage_names",
        "dtype",
        "architectures",
        "transformers_version",
        "model_type",
    )
    sizes = {
        key: value
        for key, value in built.to_dict().items()
        if not key.startswith("_") and key not in apart and key in default and value != default[key]
    }
    return asked.model_copy(update={"checkpoint": None, "config": sizes, "out_indices": list(built.out_indices)})
