"""Build the model and open the data of a run. Needs no DeepSpeed."""

from __future__ import annotations

from transformers import PreTrainedConfig

from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.loader import TaskData
from allinone_ds.data.sources import open_source
from allinone_ds.errors import ConfigError
from allinone_ds.model import AllInOneModel
from allinone_ds.models.architectures import chosen_indices
from allinone_ds.models.backbone import BackboneConfig, build_backbone, own_fields
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.tasks import build_task, task_class
from allinone_ds.tasks.test_time import view_sizes


def build_model(config: RunConfig, facts: ModelFacts) -> AllInOneModel:
    """Build the model of a run, with random weights or those of the backbone's checkpoint.

    Args:
        config: configuration of the run; only `tasks` is used.
        facts: backbone configuration and class names.

    Raises:
        ConfigError: an invalid head, option or test-time view.
    """
    backbone = build_backbone(facts.backbone)
    tasks = {
        name: build_task(task.type, name, facts.classes[name], backbone, task.image_size, task.head, task.options)
        for name, task in config.tasks.items()
    }
    for name, task in config.tasks.items():  # checked before training, not in the evaluation after it
        if task.test_time is not None:
            tasks[name].check_test_time(task.test_time)
            for _, window in view_sizes(task.test_time, task.image_size, backbone.size_multiple):
                if refusal := backbone.refuses(window):
                    raise ConfigError(
                        f"tasks.{name}.test_time: views of {window[0]} x {window[1]} pixels: {refusal}; use scales "
                        "[1.0]"
                    )
    return AllInOneModel(backbone, tasks)


def open_train_data(config: RunConfig) -> dict[str, TaskData]:
    """Return {task: training data}.

    Raises:
        DataError: invalid data; the message names the file.
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
    """Return {task: test data} for the tasks with test data, with the class ids of the training data.

    Args:
        config: configuration of the run.
        classes: {task: class names of its training data}.

    Raises:
        DataError: invalid data; the message names the file.
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


def without_checkpoint(configured: BackboneConfig, built: PreTrainedConfig) -> BackboneConfig:
    """Return a backbone configuration that needs no checkpoint: the sizes of the built backbone replace it.

    Args:
        configured: configuration that the backbone was built from.
        built: configuration of the built backbone.
    """
    if configured.checkpoint is None:
        return configured
    default, values = type(built)().to_dict(), built.to_dict()
    sizes = {key: values[key] for key in sorted(own_fields(built)) if key in values and values[key] != default[key]}
    return configured.model_copy(update={"checkpoint": None, "config": sizes, "out_indices": chosen_indices(built)})
