"""The schema of a run's YAML file. Every checkpoint holds the resolved file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from allinone_ds.balance.assignment import check_groups
from allinone_ds.balance.options import BalancerConfig, combination_error
from allinone_ds.data.augmentation.branches import Augment, AugmentConfig
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.data.base import SourceConfig
from allinone_ds.data.combination import Split, combine
from allinone_ds.data.formats.class_names import ClassNames
from allinone_ds.data.sources import Sources
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.run_config.engine_settings import read_engine
from allinone_ds.run_config.yaml_files import read_deepspeed, read_yaml
from allinone_ds.strict import ConfigPath, Strict, check_task_name, explain
from allinone_ds.tasks.test_time import TestTime


def _height_width(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _augment_file(value: Any) -> Any:
    return read_yaml(value) if isinstance(value, str) else value


class ModelConfig(Strict):
    """The part of the model that all tasks share."""

    backbone: BackboneConfig
    start_from: ConfigPath | None = None
    """Folder of an earlier run or checkpoint with the same backbone, whose weights the run starts from. The head of a
    task whose name or classes differ starts from random weights."""


class TaskConfig(Strict):
    """One task: its head, its data and the number of its images per optimizer step."""

    type: str
    """"detection", "segmentation", "classification", or "module:Class" for a custom task."""
    head: str | None = None
    """Name of the head; None is the default head of the task."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the head."""
    image_size: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_height_width)]
    """(height, width) in pixels that images are resized to; a single number is both."""
    batch_size: PositiveInt
    """Images per micro-batch and rank."""
    eval_batch_size: PositiveInt | None = None
    """Images per evaluation batch and rank; None is `batch_size`."""
    micro_steps: PositiveInt = 1
    """Micro-batches per optimizer step and rank."""
    test_time: TestTime | None = None
    """Views of each image (flips, scales) whose predictions are merged in evaluation and prediction; None: no views."""
    classes: ClassNames | None = None
    """Class names in the order of the labels, or a text file with one name per line, for all sources of the task; None:
    those of the first source."""
    train: Sources
    """The training data: a source, or a list of sources."""
    test: Sources | None = None
    """The evaluation data. None: the task is trained, but not evaluated, unless `split` is set."""
    split: Split | None = None
    """Fraction of the training data that is evaluated on instead, in place of `test`."""
    cache: bool = False
    """Keep decoded images in memory; for small images, where decoding dominates the loading time."""
    augment: Annotated[Augment, BeforeValidator(_augment_file)] = Field(default=[], validate_default=True)
    """A list of transforms; `branches`, i.e. lists of which one is drawn per sample; or a file that holds either."""

    @field_validator("augment")
    @classmethod
    def _buildable(cls, value: AugmentConfig, info: ValidationInfo) -> AugmentConfig:
        """Report invalid names and options when the file is read, not when training starts."""
        if "image_size" in info.data and "type" in info.data:
            kind = None if ":" in info.data["type"] else info.data["type"]
            train_transform(value, info.data["image_size"], kind)
        return value

    @model_validator(mode="after")
    def _sources_fit(self) -> TaskConfig:
        """Refuse keys of the data that would have no effect."""
        if self.split is not None and self.test is not None:
            raise ConfigError("'test' and 'split' are both set; remove one: 'split' takes test data from 'train'")
        if isinstance(self.train, SourceConfig) and self.train.weight != 1:
            raise ConfigError(f"train.weight = {self.train.weight:g}, but there is no second source; remove it")
        test = [] if self.test is None else [self.test] if isinstance(self.test, SourceConfig) else self.test
        if any(source.weight != 1 for source in test):
            raise ConfigError("test: 'weight' has no effect, every test sample is evaluated once; remove it")
        return self

    @property
    def train_source(self) -> SourceConfig:
        """The training data as one source, for `open_source`."""
        return combine(self.train, self.classes, self.split)

    @property
    def test_source(self) -> SourceConfig | None:
        """The evaluation data as one source, for `open_source`; None if there is none."""
        if self.split is not None:
            return combine(self.train, self.classes, self.split, "test")
        return None if self.test is None else combine(self.test, self.classes)


class RunConfig(Strict):
    """The configuration of one run; `load_config` reads it from a YAML file.

    Example:
        >>> config = load_config("configs/runs/demo.yaml")
        >>> config.tasks["detection"].batch_size, config.step_images
        (6, 34)
    """

    name: str
    output_dir: ConfigPath | None = None
    """Folder that the run is written to; None is runs/NAME."""
    data_root: ConfigPath = Path(".")
    """Folder that relative paths of the data sources start from."""
    model: ModelConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    balancer: BalancerConfig = Field(default_factory=BalancerConfig)
    """`name` of the weighting and its options, and the options of TaskBalancer."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Fields of `AllInOneArguments`, which extends `transformers.TrainingArguments`."""
    deepspeed: str | dict[str, Any] = "configs/deepspeed/zero2.json"
    """DeepSpeed config: a JSON file or its content."""
    max_broken_images: int = Field(default=100, ge=0)
    """Unreadable images, over all ranks, that are skipped and counted before the run stops."""

    @field_validator("tasks")
    @classmethod
    def _usable_names(cls, value: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        """Refuse names that cannot be part of the names of files, modules, logs and overrides."""
        for name in value:
            check_task_name(name)
        return value

    @property
    def run_dir(self) -> Path:
        """Folder that the run is written to."""
        return self.output_dir if self.output_dir is not None else Path("runs") / self.name

    @property
    def step_images(self) -> int:
        """Images per rank and optimizer step."""
        return sum(task.batch_size * task.micro_steps for task in self.tasks.values())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate the YAML file of a run. An unknown key is an error that suggests the nearest valid key.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: dotted overrides, for example ["trainer.max_steps=50"].

    Raises:
        ConfigError: one line per mistake.

    Example:
        >>> config = load_config("configs/runs/demo.yaml", ["trainer.max_steps=50"])
        >>> sorted(config.tasks), config.trainer["max_steps"], str(config.run_dir)
        (['classification', 'detection', 'segmentation'], 50, 'runs/demo')
    """
    content = read_yaml(path, overrides)
    where = str(path)
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, where)) from error
    if isinstance(config.deepspeed, str):
        config.deepspeed = read_deepspeed(config.deepspeed)
    try:
        check_balancer(config)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    return config


def check_balancer(config: RunConfig) -> None:
    """Refuse a balancer that cannot run with the tasks and the DeepSpeed engine of a run.

    Args:
        config: the run, the content of its DeepSpeed file in it.

    Raises:
        ConfigError: names the option, and says what to do.
    """
    balancer = config.balancer
    if balancer.groups is not None:
        try:
            check_groups(balancer.groups, tuple(config.tasks))
        except ConfigError as error:
            raise ConfigError(f"balancer.{error}") from error
    try:
        balancer.weighting().check_tasks(tuple(config.tasks))
    except ValueError as error:
        raise ConfigError(f"balancer: {error}") from error
    engine = read_engine(config.deepspeed, bool(config.trainer.get("bf16")), bool(config.trainer.get("fp16")))
    refusal = combination_error(
        balancer.norm, balancer.parallel, balancer.weighting(), engine.stage, engine.keeps_local_gradients
    )
    if refusal is not None:
        raise type(refusal)(f"balancer: {refusal}")
