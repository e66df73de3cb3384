"""The schema of a task and of a joint group in a run's YAML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from allinone_ds.data.augmentation.branches import Augment, AugmentConfig
from allinone_ds.data.augmentation.transforms import train_transform
from allinone_ds.data.base import SourceConfig
from allinone_ds.data.combination import Split, combine
from allinone_ds.data.formats.common.class_names import ClassNames
from allinone_ds.data.joint.dataset import JOINT
from allinone_ds.data.joint.sources import GroupSource, JointSources, TaskOfGroup, check_labels
from allinone_ds.data.sources import Sources
from allinone_ds.errors import ConfigError
from allinone_ds.models.lora import LoraOptions
from allinone_ds.run_config.head_schedule import HeadSchedule
from allinone_ds.run_config.yaml_files import read_yaml
from allinone_ds.strict import Strict
from allinone_ds.tasks.test_time import TestTime


def _height_width(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _augment_file(value: Any) -> Any:
    return read_yaml(value) if isinstance(value, str) else value


class ImagesConfig(Strict):
    """What a task and a joint group have in common: their images, and how many of them are in an optimizer step."""

    image_size: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_height_width)]
    """(height, width) in pixels that images are resized to; a single number is both."""
    batch_size: PositiveInt
    """Images per micro-batch and rank."""
    eval_batch_size: PositiveInt | None = None
    """Images per evaluation batch and rank; None is `batch_size`."""
    micro_steps: PositiveInt = 1
    """Micro-batches per optimizer step and rank."""
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
        kind = cls._kind(info.data)
        if "image_size" in info.data and kind is not None:
            train_transform(value, info.data["image_size"], kind or None)
        return value

    @classmethod
    def _kind(cls, data: dict[str, Any]) -> str | None:
        """Return the kind of data for which transforms are checked; "" for any, None if it is not known."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _sources_fit(self) -> ImagesConfig:
        """Refuse keys of the data that would have no effect."""
        train, test = vars(self)["train"], vars(self)["test"]  # fields of the subclasses
        if self.split is not None and test is not None:
            raise ConfigError("'test' and 'split' are both set; remove one: 'split' takes test data from 'train'")
        if isinstance(train, SourceConfig) and train.weight != 1:
            raise ConfigError(f"train.weight = {train.weight:g}, but there is no second source; remove it")
        if any(source.weight != 1 for source in _as_list(test)):
            raise ConfigError("test: 'weight' has no effect, every test sample is evaluated once; remove it")
        return self


class HeadConfig(Strict):
    """What a task has besides its images: kind and head."""

    type: str
    """"detection", "segmentation", "instances", "keypoints", "depth", "normals", "edges", "saliency", "classification",
    "attributes", "regression", "retrieval", or "module:Class" for a custom task."""
    head: str | None = None
    """Name of the head; None is the default head of the task."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the head."""
    lr_factor: PositiveFloat = 1.0
    """Learning rate of the head divided by `trainer.learning_rate`."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the head; None is `trainer.weight_decay`."""
    schedule: HeadSchedule | None = None
    """Learning-rate schedule of the head; None is that of `trainer.lr_scheduler_type`."""
    lora: LoraOptions | None = None
    """Adapters of the task's own in the backbone, beside those of `model.lora`; they are balanced with its head."""
    test_time: TestTime | None = None
    """Views of each image (flips, scales) whose predictions are merged in evaluation and prediction; None: no views."""
    continues: str | Literal[False] | None = None
    """On a resume: the task of the checkpoint whose head, optimizer state and data this task goes on with; false: it
    starts fresh; null: the one of the same name, if there is one."""
    classes: ClassNames | None = None
    """Class names in the order of the labels, or a text file with one name per line, for all sources of the task; None:
    those of the first source."""


class TaskConfig(ImagesConfig, HeadConfig):
    """One task: its head, its data and the number of its images per optimizer step. For a task of a joint group, the
    keys from `image_size` on are those of its group, and are not given here."""

    train: Sources
    """The training data: a source, or a list of sources."""
    test: Sources | None = None
    """The evaluation data. None: the task is trained, but not evaluated, unless `split` is set."""

    _name: str = PrivateAttr("")
    _group: JointConfig | None = PrivateAttr(None)

    @classmethod
    def _kind(cls, data: dict[str, Any]) -> str | None:
        return ("" if ":" in data["type"] else data["type"]) if "type" in data else None

    @model_serializer(mode="wrap")
    def _without_keys_of_group(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = handler(self)
        return content if self._group is None else {k: v for k, v in content.items() if k in HeadConfig.model_fields}

    def join(self, name: str, group: JointConfig) -> None:
        """Take the keys of the images from the joint group that the task belongs to.

        Args:
            name: name of the task.
            group: the group.

        Raises:
            ConfigError: a transform of the group cannot move the targets of this kind.
        """
        if ":" not in self.type:
            train_transform(group.augment, group.image_size, self.type)
        vars(self).update({key: getattr(group, key) for key in ImagesConfig.model_fields})
        self._name, self._group = name, group

    @property
    def in_group(self) -> bool:
        """Whether the task belongs to a joint group."""
        return self._group is not None

    @property
    def train_source(self) -> SourceConfig:
        """The training data as one source, for `open_source`."""
        if self._group is not None:
            return TaskOfGroup(group=self._group.train_source, task=self._name)
        return combine(self.train, self.classes, self.split)

    @property
    def test_source(self) -> SourceConfig | None:
        """The evaluation data as one source, for `open_source`; None if there is none."""
        if self._group is not None:
            source = self._group.test_source
            return None if source is None else TaskOfGroup(group=source, task=self._name)
        if self.split is not None:
            return combine(self.train, self.classes, self.split, "test")
        return None if self.test is None else combine(self.test, self.classes)


class JointConfig(ImagesConfig):
    """Tasks that read one image set: one augmentation moves all their targets, and one forward serves all of them."""

    tasks: list[str] = Field(min_length=1)
    """Names of the tasks, which are defined in `tasks` without data of their own."""
    at: Literal["backbone", "features"] = "backbone"
    """Where gradients are balanced: "backbone" has exact norms and one backward per task; "features" has norms at the
    features that the heads read and one backward for all tasks."""
    train: JointSources
    """The training data: a source, or a list of sources."""
    test: JointSources | None = None
    """The evaluation data. None: the tasks are trained, but not evaluated, unless `split` is set."""

    _name: str = PrivateAttr("")
    _classes: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def _kind(cls, data: dict[str, Any]) -> str:
        return JOINT

    def settle(self, name: str, tasks: dict[str, TaskConfig]) -> None:
        """Take what the rest of the run's configuration says about the group, and check that both fit.

        Args:
            name: name of the group.
            tasks: the tasks of the run by name.

        Raises:
            ConfigError: a source has labels of other tasks, a transform does not support the kind of a task, or a task
                has adapters of its own.
        """
        own = {task: tasks[task] for task in self.tasks}
        for task, keys in own.items():
            if keys.lora is not None:
                raise ConfigError(
                    f"tasks.{task}.lora: the task belongs to joint.{name}, whose tasks share one forward of the "
                    "backbone, so none can have adapters of its own; remove it, or give the task images of its own"
                )
        self._name = name
        self._classes = {task: keys.classes for task, keys in own.items() if keys.classes is not None}
        for part in (self.train, self.test):
            check_labels(name, self.tasks, _as_list(part))
        for task, keys in own.items():
            try:
                train_transform(self.augment, self.image_size, None if ":" in keys.type else keys.type)
            except ConfigError as error:
                raise ConfigError(f"joint.{name}.augment, for the task '{task}': {error}") from error

    @property
    def train_source(self) -> GroupSource:
        """The training data as one source, for `open_source`."""
        return self._source(self.train, "train")

    @property
    def test_source(self) -> GroupSource | None:
        """The evaluation data as one source, for `open_source`; None if there is none."""
        sources = self.test if self.split is None else self.train
        return None if sources is None else self._source(sources, "test")

    def _source(self, sources: Any, part: Literal["train", "test"]) -> GroupSource:
        return GroupSource(
            group=self._name,
            tasks=self.tasks,
            sources=_as_list(sources),
            classes=self._classes,
            split=self.split,
            part=part,
        )


def _as_list(sources: Any) -> list[SourceConfig]:
    return [] if sources is None else [sources] if isinstance(sources, SourceConfig) else list(sources)
