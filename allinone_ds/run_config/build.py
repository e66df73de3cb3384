"""Build the model and open the data of a run. Needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from allinone_ds.data.augmentation.transforms import eval_transform, train_transform
from allinone_ds.data.base import SampleDataset, raise_problems
from allinone_ds.data.formats.common.listing import unused_by_both
from allinone_ds.data.inspection.files import depths_at_start, overlap_at_start
from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.data.joint.batches import JointCollate, by_task
from allinone_ds.data.joint.dataset import JointDataset
from allinone_ds.data.loading.task_data import Collate, Joint, TaskData
from allinone_ds.data.sources import open_source
from allinone_ds.errors import ConfigError
from allinone_ds.model import AllInOneModel
from allinone_ds.models.architectures import chosen_indices
from allinone_ds.models.backbone import Backbone, BackboneConfig, build_backbone, own_fields
from allinone_ds.models.freezing import freeze_backbone
from allinone_ds.models.lora import add_lora
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig
from allinone_ds.run_config.task_config import JointConfig, TaskConfig
from allinone_ds.tasks import TASKS, build_task, task_class
from allinone_ds.tasks.test_time import view_sizes


def build_model(config: RunConfig, facts: ModelFacts) -> AllInOneModel:
    """Build the model of a run, with random weights or those of the backbone's checkpoint.

    Args:
        config: configuration of the run; only `tasks`, `model.freeze`, `model.thaw` and `model.lora` are used.
        facts: backbone configuration and class names.

    Raises:
        ConfigError: an invalid head, option or test-time view.
    """
    backbone = build_backbone(facts.backbone)
    freeze_backbone(backbone, config.model.never_trained)  # the trainer freezes what is thawed later
    add_adapters(backbone, config)
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


def add_adapters(backbone: Backbone, config: RunConfig) -> None:
    """Add the adapters of a run to its backbone: those that all tasks share, and those of single tasks.

    Args:
        backbone: what `build_backbone` returned.
        config: configuration of the run.

    Raises:
        ConfigError: as of `add_lora`.
    """
    if config.model.lora is not None:
        add_lora(backbone, config.model.lora)
    for name, task in config.tasks.items():
        if task.lora is not None:
            add_lora(backbone, task.lora, name)


def open_train_data(config: RunConfig) -> dict[str, TaskData]:
    """Return {task or joint group: training data}.

    Raises:
        DataError: invalid data; the message names the file.
    """
    data = {}
    for name, images in config.images.items():
        dataset = open_source(images.train_source, config.data_root)
        collate, joint = _checked(config, name, images, "train", dataset)
        data[name] = TaskData(
            dataset=dataset,
            transform=train_transform(images.augment, images.image_size, dataset.kind),
            collate=collate,
            batch_size=images.batch_size,
            micro_steps=images.micro_steps,
            cache=images.cache,
            joint=joint,
        )
    return data


def open_test_data(config: RunConfig, classes: dict[str, list[str]]) -> dict[str, TaskData]:
    """Return {task or joint group: test data} where there is test data, with the class ids of the training data.

    Args:
        config: configuration of the run.
        classes: {task: class names of its training data}.

    Raises:
        DataError: invalid data; the message names the file.
    """
    data = {}
    for name, images in config.images.items():
        source = images.test_source
        if source is not None:
            known = {task: classes[task] for task in images.tasks} if isinstance(images, JointConfig) else classes[name]
            dataset = open_source(source, config.data_root, known)
            collate, joint = _checked(config, name, images, "test", dataset)
            data[name] = TaskData(
                dataset=dataset,
                transform=eval_transform(images.image_size),
                collate=collate,
                batch_size=images.eval_batch_size or images.batch_size,
                cache=images.cache,
                test_time=None if isinstance(images, JointConfig) else images.test_time,
                joint=joint,
            )
    return data


def classes_of(data: Mapping[str, TaskData]) -> dict[str, list[str]]:
    """Return {task: its class names} of opened data."""
    return {name: list(part.dataset.classes) for name, part in by_task(data).items()}


def _checked(
    config: RunConfig, name: str, images: TaskConfig | JointConfig, part: str, dataset: SampleDataset
) -> tuple[Collate, Joint | None]:
    """Return what makes batches, and the joint group, after the kinds of the data were compared with the tasks."""
    if isinstance(images, TaskConfig):
        _check_kind(f"tasks.{name}.{part}", images.type, dataset.kind)
        return task_class(images.type).collate, None
    assert isinstance(dataset, JointDataset)  # GroupSource has checked it
    classes = {task: task_class(config.tasks[task].type) for task in images.tasks}
    for task in images.tasks:
        _check_kind(f"joint.{name}.{part}, task '{task}'", config.tasks[task].type, dataset.kinds[task])
    collate = JointCollate(
        {task: cls.collate for task, cls in classes.items()}, {task: cls.unlabelled for task, cls in classes.items()}
    )
    test_time = {task: config.tasks[task].test_time for task in images.tasks}
    return collate, Joint(tuple(images.tasks), images.at, {t: views for t, views in test_time.items() if views})


def _check_kind(where: str, task_type: str, found: str) -> None:
    """Refuse data of another kind than the task reads; a custom task may read any."""
    kind = TASKS[task_type].kind if task_type in TASKS else found
    if found != kind:
        raise ConfigError(
            f"{where}: the data is for {found}, the task is a {task_type}; choose a format of data for {kind}, "
            f"or set type: {found}"
        )


def inspect_data(config: RunConfig, train: Mapping[str, TaskData], test: Mapping[str, TaskData]) -> None:
    """Count what each task can learn from, and compare its test images with its training images.

    Warnings are added to the `structural` of the datasets.

    Args:
        config: configuration of the run.
        train: {task or joint group: training data}.
        test: {task or joint group: test data}, where there is any.

    Raises:
        DataError: nothing can be learned from the data of a task, or all its test images are training images.
    """
    for name, images in config.images.items():
        if name in test:
            pair = train[name].dataset, test[name].dataset
            pair[0].structural, pair[1].structural = unused_by_both(pair[0].structural, pair[1].structural)
        for part in (train, test):
            if name in part:
                dataset = part[name].dataset
                problems = [
                    problem
                    for seen in by_task({name: part[name]}).values()
                    for problem in target_problems(seen.dataset, images.image_size, part is train)
                ]
                problems += depths_at_start(dataset)
                if part is test:
                    problems += overlap_at_start(train[name].dataset, dataset)
                raise_problems(f"{'task' if name in config.tasks else 'joint group'} '{name}'", problems)
                found = [*problems, *dataset.structural]
                dataset.structural = [problem._replace(unused=frozenset()) for problem in found]  # may name a million


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
