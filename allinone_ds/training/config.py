"""One YAML file describes one run; it is read strictly and written back, resolved, beside every checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from allinone_ds.data.augment import Augment, AugmentConfig
from allinone_ds.data.sources import Source
from allinone_ds.data.transforms import train_transform
from allinone_ds.models.backbone import BackboneConfig
from allinone_ds.strict import ConfigError, Strict, explain
from allinone_ds.tasks.test_time import TestTime
from allinone_ds.training.files import read_deepspeed, read_yaml
from allinone_ds.training.folder import CONFIG_FILE, MODEL_FILE


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
    balancer: dict[str, Any] = Field(default_factory=lambda: {"name": "tbgc"})
    """`name` of the weighting and its options; `norm`, `sketch_size`, `task_traces`, `cosines_every`, `parallel` and
    `groups` are those of TaskBalancer."""
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
    return config


def save_config(config: RunConfig, folder: str | Path) -> Path:
    """Write the resolved configuration into a folder, whole or not at all; `load_config` reads it back."""
    target = Path(folder) / CONFIG_FILE
    _write_whole(target, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110))
    return target


def _write_whole(target: Path, text: str) -> None:
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(text)
    scratch.replace(target)


class ModelFacts(Strict):
    """What is needed beside configuration and weights to build a run's model again, without its data."""

    backbone: BackboneConfig
    """The backbone with its sizes spelled out, so that the checkpoint it started from is not needed."""
    classes: dict[str, list[str]]
    """Class names by task."""


def save_run_files(config: RunConfig, facts: ModelFacts, folder: str | Path) -> None:
    """Write what is needed beside the weights to use them: config.yaml and model.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    _write_whole(Path(folder) / MODEL_FILE, facts.model_dump_json(indent=1) + "\n")


def read_run_files(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, ModelFacts]:
    """Configuration and model of a run (or of one of its checkpoints).

    Args:
        folder: the run's.
        overrides: dotted keys laid over its configuration.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it; give the folder of a run or of one of its checkpoints")
    facts = ModelFacts.model_validate_json((folder / MODEL_FILE).read_text())
    return load_config(folder / CONFIG_FILE, overrides), facts
