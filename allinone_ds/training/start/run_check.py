"""Everything that `allinone-ds check` examines besides the data files: what would end a run at its start."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from allinone_ds.balance.assignment import groups_for
from allinone_ds.data.augmentation.transforms import eval_transform, normalize, stack_pixels, train_transform
from allinone_ds.data.base import SampleDataset, SourceConfig
from allinone_ds.data.inspection.samples import fault_of
from allinone_ds.data.joint.dataset import JointDataset, TaskView, view_of
from allinone_ds.data.loading.further_samples import FurtherSamples
from allinone_ds.data.sources import open_source
from allinone_ds.errors import AllInOneError, ConfigError, DataError
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.models.freezing import freeze_backbone
from allinone_ds.models.pretrained import checkpoint_config
from allinone_ds.run_config.arguments import AllInOneArguments, arguments_from_config, check_trainer_keys
from allinone_ds.run_config.build import add_adapters, without_checkpoint
from allinone_ds.run_config.schema import RunConfig, TaskConfig, check_balancer, read_config
from allinone_ds.run_config.task_config import JointConfig
from allinone_ds.run_folder.checkpoints import check_resume, checkpoints, parse_resume
from allinone_ds.tasks import Task, build_task, task_class
from allinone_ds.training.load_checkpoint import changes_since, check_resumable
from allinone_ds.training.optimizer import groups_of_run
from allinone_ds.training.start.arguments import argument_problems
from allinone_ds.training.start.callbacks import configured_callbacks
from allinone_ds.training.warm_start import start_from

_SAMPLES = 2
"""Samples per task that are transformed and given to the task's loss."""
_T = TypeVar("_T")
_DEEPSPEED = {"zero_optimization": {"stage": 2}}
_CLASSES = 100
"""Classes of a task whose data cannot be opened."""


Opened = dict[str, SampleDataset | SourceConfig]
"""Data sets by name of the task or joint group and part, "signs train"; the source of one that cannot be opened."""


def check_run(path: str | Path, overrides: Sequence[str], ranks: int) -> tuple[RunConfig | None, list[str], Opened]:
    """Return everything that would end a run at its start, except faults of single data files.

    The configuration is read, the model is built without memory for its weights, and samples of every task pass
    through each branch of its augmentation to the loss of its head. Nothing is written.

    Args:
        path: YAML file of the run.
        overrides: dotted overrides.
        ranks: number of ranks that the run is to start with.

    Returns:
        The configuration without its invalid keys (None: too little of it is valid), one line per problem, and the
        data of the run, each source opened once.
    """
    found: list[str] = []
    config, problems = read_config(path, overrides)
    found += problems
    if config is None:
        return None, found, {}
    opened = _open(config)
    args = _arguments(config, found)
    unset_hf_deepspeed_config()  # else the model would be partitioned, which needs ranks
    _collect(found, lambda: check_balancer(config), f"{path}: ")
    _collect(found, lambda: configured_callbacks(config))
    if config.balancer.parallel == "tasks":
        _collect(found, lambda: groups_for("tasks", config.balancer.groups, tuple(config.tasks), ranks))
    with torch.device("meta"):
        backbone = _collect(found, lambda: build_backbone(_without_weights(config.model.backbone)))
    if backbone is not None:
        _collect(found, lambda: freeze_backbone(backbone, config.model.never_trained))
        with torch.device("meta"):
            _collect(found, lambda: add_adapters(backbone, config))
    else:
        return config, found, opened
    tasks = {}
    for name, images in config.images.items():
        for task in images.tasks if isinstance(images, JointConfig) else [name]:
            datasets = {part: _seen(opened, name, part, task) for part in ("train", "test")}
            built = _check_task(found, task, config.tasks[task], backbone, datasets)
            if built is not None:
                tasks[task] = built
        if isinstance(images, JointConfig):
            _check_pixels(found, config, images, opened[f"{name} train"])
    tasks = {name: tasks[name] for name in config.tasks if name in tasks}
    complete = len(tasks) == len(config.tasks)
    if args is not None:
        evaluated = {name: task for name, task in tasks.items() if config.tasks[name].test_source is not None}
        found += argument_problems(args, evaluated if complete else None)
    model = _collect(found, lambda: AllInOneModel(backbone, tasks)) if complete else None
    if model is not None and args is not None:
        _collect(found, lambda: groups_of_run(model, args))
        _check_folders(found, config, model)
    return config, list(dict.fromkeys(found)), opened


def _open(config: RunConfig) -> Opened:
    """Open the data of every task and joint group; the check of the data files reports what cannot be opened."""
    opened: Opened = {}
    for name, images in config.images.items():
        classes: Any = None
        for part, source in (("train", images.train_source), ("test", images.test_source)):
            if source is None:
                continue
            try:
                dataset = open_source(source, config.data_root, classes, strict=False)
            except DataError:
                opened[f"{name} {part}"] = source
                continue
            opened[f"{name} {part}"] = dataset
            classes = classes or (dataset.classes_of if isinstance(dataset, JointDataset) else dataset.classes)
    return opened


def _seen(opened: Opened, name: str, part: str, task: str) -> SampleDataset | None:
    """Return what a task sees of opened data; None if there is none."""
    dataset = opened.get(f"{name} {part}")
    if isinstance(dataset, JointDataset):
        return TaskView(dataset, task)
    return dataset if isinstance(dataset, SampleDataset) else None


def _without_weights(configured: BackboneConfig) -> BackboneConfig:
    """Return a configuration with the sizes of the backbone's checkpoint, of which only the configuration is read."""
    if configured.checkpoint is None:
        return configured
    sizes = without_checkpoint(configured, checkpoint_config(configured.checkpoint))
    return sizes.model_copy(update={"config": {**sizes.config, **configured.config},
                                    "out_indices": configured.out_indices})  # fmt: skip


def _arguments(config: RunConfig, found: list[str]) -> AllInOneArguments | None:
    """Return the arguments; of a file with invalid keys those of a copy without them, to check the others too."""
    config = config.model_copy(deep=True)
    try:
        check_trainer_keys(config.trainer)
    except ConfigError as error:
        found += str(error).splitlines()
        for key in list(config.trainer):
            try:
                check_trainer_keys({key: config.trainer[key]})
            except ConfigError:
                del config.trainer[key]
    while True:
        try:
            return arguments_from_config(config)
        except ConfigError as error:
            found += str(error).splitlines()
            wrong = [key for key in config.trainer if re.search(rf"\b{key}\b", str(error))]
            if not wrong and ("deepspeed" not in str(error) or config.deepspeed == _DEEPSPEED):
                return None
            for key in wrong:
                del config.trainer[key]
            if "deepspeed" in str(error):
                config.deepspeed = _DEEPSPEED


def _collect(found: list[str], function: Callable[[], _T], where: str = "") -> _T | None:
    """Return the result of a function; on an error of the package, note its message."""
    try:
        return function()
    except AllInOneError as error:
        found += f"{where}{error}".splitlines()
        return None


def _check_task(
    found: list[str], name: str, task: TaskConfig, backbone: Any, data: Mapping[str, SampleDataset | None]
) -> Task | None:
    """Build one task and compute its loss for samples of its data; return it on the meta device."""
    datasets = {part: dataset for part, dataset in data.items() if dataset is not None}
    classes = next(iter(datasets.values())).classes if datasets else None
    expect = task.train_source.expect
    names = classes or [str(k) for k in range((expect and expect.classes) or _CLASSES)]

    def build() -> Task:
        made = build_task(task.type, name, names, backbone, task.image_size, task.head, task.options)
        if task.test_time is not None:
            made.check_test_time(task.test_time)
        return made

    head = _collect(found, build)  # on the CPU: heads are small
    if head is not None:
        if reason := head.constant_loss():
            found.append(f"tasks.{name}: {reason}")
        for part, dataset in datasets.items():
            _check_samples(found, f"tasks.{name}", task, part, dataset, head)
        head = head.to("meta")
    return head


def _check_samples(
    found: list[str], where: str, task: TaskConfig, part: str, dataset: SampleDataset, head: Task
) -> None:
    """Give the first readable samples to each branch of the augmentation, and a batch to the loss of the head."""
    samples = []
    for index in range(min(len(dataset), 20)):
        try:
            sample = dataset[index]
            if fault_of(dataset, sample) is None:
                samples.append(sample)
        except Exception:  # the check of the data files reports it, as it does what a sample lacks
            continue
        if len(samples) == _SAMPLES:
            break
    if not samples:
        return
    collate = task_class(task.type).collate
    transforms = {"": eval_transform(task.image_size)}
    if part == "train":
        whole = train_transform(task.augment, task.image_size, dataset.kind)
        transforms = {f", branch '{name}'": whole.only(name) for name in whole.branches}
    state = torch.get_rng_state()
    for branch, transform in transforms.items():
        step = f"{where}.{'augment' if part == 'train' else part}{branch}"
        try:
            drawn = [transform(sample, FurtherSamples(dataset, [], len(dataset))) for sample in samples]
            step = f"{where}.{part}, collate{branch}"
            batch = collate(drawn)
        except Exception as error:  # transforms and tasks, also the user's own, may raise anything
            found.append(f"{step}: {_failure(error, samples)}")
            break
    else:
        if part == "train":  # one batch, since a large head takes seconds on a CPU
            try:
                _loss(head, batch)
            except Exception as error:
                found.append(f"{where}, loss{branch}: {_failure(error, samples)}")
    torch.set_rng_state(state)


def _check_pixels(found: list[str], config: RunConfig, group: JointConfig, dataset: Any) -> None:
    """Refuse tasks of a joint group whose `collate` changes the pixels: the tasks share one batch of images."""
    if not isinstance(dataset, JointDataset) or not len(dataset):
        return
    try:
        sample = dataset[0]
        if fault_of(dataset, sample) is not None:
            return
    except Exception:  # the check of the data files reports it, as it does what a sample lacks
        return
    drawn = eval_transform(group.image_size)(sample)
    for task in group.tasks:
        if task in drawn["targets"]:
            pixels = task_class(config.tasks[task].type).collate([view_of(drawn, task)])["pixel_values"]
            if pixels.dtype != torch.uint8 or not torch.equal(pixels, stack_pixels([drawn])):
                found.append(
                    f"tasks.{task}: its class changes the pixels in `collate`, and the tasks of a joint group share "
                    "one batch of images; use stack_pixels there, or give the task images of its own"
                )


def _failure(error: Exception, samples: Sequence[Any]) -> str:
    text = str(error) if isinstance(error, AllInOneError) else f"{type(error).__name__}: {error}"
    return f"fails on {samples[0].get('path', 'the first sample')}: {' '.join(text.split())}"


def _loss(head: Task, batch: dict[str, Any]) -> None:
    """Compute the loss of a task, on random feature maps."""
    pixels = batch["pixel_values"]
    if pixels.dtype == torch.uint8:
        pixels = normalize(pixels)
    batch_size, _, height, width = pixels.shape
    shape = (batch_size, head.channels, height // head.stride, width // head.stride)
    features = tuple(torch.randn(shape) for _ in range(head.num_levels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = head(features, pixels, batch["labels"]).loss
    if loss is None or loss.dim():
        raise ConfigError("forward with labels must return a scalar `loss`")


def _check_folders(found: list[str], config: RunConfig, model: nn.Module) -> None:
    """Check the checkpoint to resume from, or the run to start from, against the model."""
    resume_from = parse_resume(config.trainer.get("resume_from_checkpoint"))
    if resume_from:
        before = len(found)
        _collect(found, lambda: check_resume(resume_from, config.run_dir))
        if len(found) > before:
            return
        checkpoint = checkpoints(config.run_dir)[-1] if resume_from is True else Path(resume_from)
        _collect(found, lambda: check_resumable(checkpoint))
        continues = {name: task.continues for name, task in config.tasks.items() if task.continues is not None}
        _collect(found, lambda: changes_since(model, checkpoint, continues))
    elif config.model.start_from is not None:
        source = config.model.start_from
        _collect(found, lambda: start_from(model, source))  # type: ignore[arg-type]
