"""One YAML file describes one run; it is read strictly and written back, resolved, beside every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from allinone_ds.balance.assignment import check_groups
from allinone_ds.balance.options import BalancerConfig, combination_error
from allinone_ds.data.augmentation.branches import Augment, AugmentConfig
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.data.sources import Source
from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.run_config.engine_settings import read_engine
from allinone_ds.run_config.yaml_files import read_deepspeed, read_yaml
from allinone_ds.strict import Strict, explain
from allinone_ds.tasks.test_time import TestTime


def _height_width(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _augment_file(value: Any) -> Any:
    return read_yaml(value) if isinstance(value, str) else value


class ModelConfig(Strict):
    """What all tasks share."""

    backbone: BackboneConfig
    start_from: Path | None = None
    """Folder of an earlier run (or checkpoint) with the same backbone: weights to start from. Heads whose task has
    another name or other classes start fresh."""


class TaskConfig(Strict):
    """One task: its head, its data and how much of it every optimizer step sees."""

    type: str
    """"detection", "segmentation", "classification", or "module:Class" for a task of one's own."""
    head: str | None = None
    """Name of the head; None is the task's default head."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the head."""
    image_size: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_height_width)]
    """(height, width) in pixels that images are resized to; one number is a square."""
    batch_size: PositiveInt
    """Images in one micro-batch of one rank."""
    eval_batch_size: PositiveInt | None = None
    """Images in one evaluation batch of one rank; None is `batch_size`."""
    micro_steps: PositiveInt = 1
    """Micro-batches in one optimizer step."""
    test_time: TestTime | None = None
    """Views of an image that are predicted and merged in evaluation and prediction; None: the image alone."""
    train: Source
    test: Source | None = None
    """A task without test data is trained and not evaluated."""
    cache: bool = False
    """Keep decoded training images in memory; for small ones, where decoding is most of the work."""
    augment: Annotated[Augment, BeforeValidator(_augment_file)] = Field(default=[], validate_default=True)
    """A list of transforms by name, or `branches` of such of which every sample takes one, or a file of branches."""

    @field_validator("augment")
    @classmethod
    def _buildable(cls, value: AugmentConfig, info: ValidationInfo) -> AugmentConfig:
        """Mistakes in names and options show when the file is read, not when training starts."""
        if "image_size" in info.data and "type" in info.data:
            kind = None if ":" in info.data["type"] else info.data["type"]
            train_transform(value, info.data["image_size"], kind)
        return value


class RunConfig(Strict):
    """All of one run."""

    name: str
    output_dir: Path | None = None
    """Where the run is written; None is runs/NAME."""
    data_root: Path = Path(".")
    """What relative paths of the data sources start from."""
    model: ModelConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    balancer: BalancerConfig = Field(default_factory=BalancerConfig)
    """`name` of the weighting and its options, and the options of TaskBalancer."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Keys of `AllInOneArguments`, which are those of transformers.TrainingArguments and a few more."""
    deepspeed: str | dict[str, Any] = "configs/deepspeed/zero2.json"
    """A DeepSpeed config: a file or its content."""
    max_broken_images: int = Field(default=100, ge=0)
    """Images that cannot be read are skipped and counted; more than this many stop the run."""

    @property
    def run_dir(self) -> Path:
        return self.output_dir if self.output_dir is not None else Path("runs") / self.name

    @property
    def step_images(self) -> int:
        """Images of one rank in one optimizer step."""
        return sum(task.batch_size * task.micro_steps for task in self.tasks.values())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run strictly: an unknown key is an error that names the nearest valid one.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: dotted keys laid over the file, for example ["trainer.max_steps=50"].

    Raises:
        ConfigError: with one line a mistake.
    """
    content = read_yaml(path, overrides)
    where = str(path)
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, where)) from error
    if isinstance(config.deepspeed, str):
        config.deepspeed = read_deepspeed(config.deepspeed)
    check_balancer(config)
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
    engine = read_engine(config.deepspeed, bool(config.trainer.get("bf16")), bool(config.trainer.get("fp16")))
    refusal = combination_error(
        balancer.norm, balancer.parallel, balancer.weighting(), engine.stage, engine.keeps_local_gradients
    )
    if refusal is not None:
        raise type(refusal)(f"balancer: {refusal}")
