"""The schema of a run's YAML file. Every checkpoint holds the resolved file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
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
from allinone_ds.data.formats.common.class_names import ClassNames
from allinone_ds.data.sources import Sources
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.models.freezing import Freeze
from allinone_ds.models.lora import LoraOptions
from allinone_ds.run_config.engine_settings import read_engine
from allinone_ds.run_config.yaml_files import DEEPSPEED, read_deepspeed, read_yaml
from allinone_ds.strict import ConfigPath, Strict, check_task_name, did_you_mean, explain
from allinone_ds.tasks.test_time import TestTime


def _height_width(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _augment_file(value: Any) -> Any:
    return read_yaml(value) if isinstance(value, str) else value


def _named_callback(value: Any) -> Any:
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        return {name: options or {} for name, options in value.items()}
    raise ConfigError(f"{value!r}: give 'module.Class', or one pair {{module.Class: {{argument: value}}}}")


def _no_none(value: Any) -> Any:
    return {} if value is None else value


class EarlyStopping(Strict):
    """When a run ends before its length, as in transformers' `EarlyStoppingCallback`."""

    patience: PositiveInt = 3
    """Evaluations in a row that may fail to improve `trainer.metric_for_best_model`."""
    threshold: NonNegativeFloat = 0.0
    """Improvement that counts."""


class ModelConfig(Strict):
    """The part of the model that all tasks share."""

    backbone: BackboneConfig
    """The shared backbone."""
    freeze: Freeze | None = None
    """What of the backbone keeps its weights: "embeddings", N (the embeddings and the first N layers) or "backbone"."""
    lora: LoraOptions | None = None
    """Train adapters (LoRA) instead of the backbone's weights, which are frozen; null: train the weights."""
    start_from: ConfigPath | None = None
    """Folder of an earlier run or checkpoint with the same backbone, whose weights the run starts from. The head of a
    task whose name or classes differ starts from random weights."""

    @model_validator(mode="after")
    def _lora_adapts_something(self) -> ModelConfig:
        if self.lora is not None and self.freeze is not None:
            raise ConfigError("'freeze' and 'lora' are both set; remove 'freeze': with adapters all weights are frozen")
        if self.lora is not None and self.start_from is None and self.backbone.checkpoint is None:
            raise ConfigError("'lora' would adapt a backbone of random weights; set backbone.checkpoint or start_from")
        return self


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
    lr_factor: PositiveFloat = 1.0
    """Learning rate of the head divided by `trainer.learning_rate`."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the head; None is `trainer.weight_decay`."""
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
    """Name of the run."""
    output_dir: ConfigPath | None = None
    """Folder that the run is written to; None is runs/NAME."""
    data_root: ConfigPath = Path(".")
    """Folder that relative paths of the data sources start from."""
    model: ModelConfig
    """What all tasks share."""
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """The tasks by name; null instead of a task drops that of a base."""
    balancer: BalancerConfig = Field(default_factory=BalancerConfig)
    """`name` of the weighting and its options, and the options of TaskBalancer."""
    epochs: dict[str, PositiveFloat] | None = Field(default=None, min_length=1, max_length=1)
    """{task: number of epochs}: length of the run as passes over the training data of one task, instead of
    `trainer.max_steps`."""
    early_stopping: EarlyStopping | None = None
    """End the run when its evaluations no longer improve."""
    callbacks: list[Annotated[dict[str, dict[str, Any]], BeforeValidator(_named_callback)]] = Field(default=[])
    """Trainer callbacks: "module.Class", or {module.Class: {argument: value}}."""
    trainer: Annotated[dict[str, Any], BeforeValidator(_no_none)] = Field(default_factory=dict)
    """Fields of `AllInOneArguments`, which extends `transformers.TrainingArguments`."""
    deepspeed: str | dict[str, Any] = DEEPSPEED
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

    @model_validator(mode="after")
    def _check_length(self) -> RunConfig:
        if self.early_stopping is not None and self.trainer.get("eval_strategy", "no") in ("no", False):
            raise ConfigError("early_stopping: it needs evaluations; set trainer.eval_strategy to steps")
        for name in self.epochs or {}:
            if name not in self.tasks:
                raise ConfigError(f"epochs.{name}: the run has no such task; {did_you_mean(name, self.tasks)}")
        return self

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
    config, mistakes = read_config(path, overrides)
    if mistakes or config is None:
        raise ConfigError("\n".join(mistakes))
    try:
        check_balancer(config)
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from error
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[str]]:
    """Read the YAML file of a run as far as it is valid.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: dotted overrides.

    Returns:
        The configuration without its invalid keys (None: what remains is no run), and one line per mistake.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_yaml(path, overrides)
    mistakes: list[str] = []
    for _ in range(_REPAIRS):
        try:
            config = RunConfig.model_validate(content)
        except ValidationError as error:
            mistakes += [line for line in explain(error, RunConfig, str(path)).splitlines() if line not in mistakes]
            if not all([_remove(content, list(item["loc"])) for item in error.errors()]):
                return None, mistakes
        else:
            try:
                if isinstance(config.deepspeed, str):
                    config.deepspeed = read_deepspeed(config.deepspeed)
            except ConfigError as error:
                mistakes.append(f"{path}: deepspeed: {error}")
                config.deepspeed = read_deepspeed(DEEPSPEED)
            return config, mistakes
    return None, mistakes


_REPAIRS = 4
"""Times that invalid keys are removed: the rest may be invalid without them."""


def _remove(content: dict[str, Any], path: Sequence[Any]) -> bool:
    """Remove the innermost key of a path that exists (a path also holds tags, and keys that are missing)."""
    owner, key, inside = content, None, content
    for part in path:
        if isinstance(inside, dict) and part in inside:
            owner, key, inside = inside, part, inside[part]
    if key is not None:
        del owner[key]
    return key is not None


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
