"""What a task is: head, loss, targets, metric and drawing in one class."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.utils import ModelOutput

from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, did_you_mean, explain
from allinone_ds.tasks.test_time import TestTime, View

Sample = dict[str, Any]
Prediction = dict[str, Any]


class Task(nn.Module, ABC):
    """Base of every task; subclass it anywhere and name it `module:Class` in the config.

    A subclass sets `kind`, `main_metric` and `unit`, builds its head in `__init__` (after `super().__init__`), and
    writes `forward`, `collate`, `predict`, `metric` and `draw`. The backbone runs outside: `forward` gets its maps.

    Args:
        name: name of the task in the run.
        classes: class names.
        channels: channels C of each of the backbone's maps.
        stride: pixels per cell of those maps.
        num_levels: how many maps there are.
        image_size: (H, W) of the network's input, in pixels.
        head: which head, one of `HEADS`; None takes the first.
        options: fields of that head's options class.

    Attributes:
        kind: kind of data it reads ("detection", "segmentation", "classification", or your own).
        main_metric: the key of `metric().compute()` that stands for the task in the run's score: in 0 to 1, the larger
            the better (the best checkpoint has the largest mean; below 0 counts as 0).
        unit: what a micro-loss averages over. The average is taken within the micro-batch of one rank: the mean over
            its "objects" (their positive locations for FCOS; RF-DETR alone divides by the objects of all ranks, as
            `transformers` does), its "valid pixels" (Mask2Former: its masks) or its "images". A task's gradient is the
            plain mean of its micro-losses over micro-steps and ranks. So 1 x 8 equals 4 x 2 exactly for "images"; for
            the others only when the micro-batches hold equally many objects or valid pixels.
    """

    kind: ClassVar[str]
    main_metric: ClassVar[str]
    unit: ClassVar[str]
    HEADS: ClassVar[Mapping[str, type[Strict]]] = {}
    """Options class of every head, by name; empty: the task has one head and reads `options` itself."""

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        channels: int,
        stride: int,
        num_levels: int,
        image_size: tuple[int, int],
        head: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = list(classes)
        self.channels, self.stride, self.num_levels = channels, stride, num_levels
        self.image_size = (int(image_size[0]), int(image_size[1]))
        if any(side % stride for side in self.image_size):
            raise ConfigError(f"tasks.{name}.image_size = {list(self.image_size)}: both sides must be multiples of "
                              f"{stride}, the backbone's patch size")  # fmt: skip
        self.head_name, self.options = self._head_options(head, options)

    def _head_options(self, head: str | None, options: dict[str, Any]) -> tuple[str | None, Any]:
        if not self.HEADS:
            if head is not None:
                raise ConfigError(f"tasks.{self.name}.head = '{head}': this task has no choice of heads; remove it")
            return None, options
        head = head or next(iter(self.HEADS))
        if head not in self.HEADS:
            raise ConfigError(f"tasks.{self.name}.head: unknown head '{head}'; {did_you_mean(head, self.HEADS)}")
        model = self.HEADS[head]
        try:
            return head, model(**options)
        except ValidationError as error:
            raise ConfigError(explain(error, model, f"tasks.{self.name}.options ({head})")) from error

    @abstractmethod
    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        """Raw predictions, and the loss when labels are given.

        Args:
            features: `num_levels` maps of (B, C, H / stride, W / stride), in the dtype of the weights.
            pixel_values: (B, 3, H, W) normalised images.
            labels: what `collate` put under "labels".

        Returns:
            A `ModelOutput` whose `loss` is a float32 scalar, or None without labels. It must depend on every weight of
            the head even when the batch holds no target.
        """

    @staticmethod
    @abstractmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        """A batch {"pixel_values", "labels"} of transformed samples (all of one size); pixels uint8 or normalised."""

    @abstractmethod
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Final predictions for each image, in pixels of the original images.

        Args:
            outputs: what `forward` returned.
            sizes: (H, W) of each original image, in pixels.
        """

    def check_test_time(self, options: TestTime) -> None:
        """Raise `ConfigError` for views that this task cannot predict or merge; a task that can, overrides it."""
        raise ConfigError(f"tasks.{self.name}.test_time: '{self.kind}' cannot merge views; remove it")

    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """What `predict` gives, from several views of the same images.

        Args:
            views: outputs for every view.
            sizes: (H, W) of each original image, in pixels.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict_views")

    @contextlib.contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        """Inside this block the network's input is of another size.

        Args:
            size: (H, W) in pixels, multiples of the stride.
        """
        before, self.image_size = self.image_size, size
        try:
            yield
        finally:
            self.image_size = before

    @abstractmethod
    def metric(self) -> Any:
        """A fresh metric: `update(predictions, samples)`, `compute() -> dict[str, float]`, `reset()`, `to(device)`."""

    @abstractmethod
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        """The prediction drawn on the image (uint8, 3 x H' x W'), beside the truth when `sample` is given."""

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """The prediction as plain numbers and lists."""
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in prediction.items()}


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which losses are computed: autocast off."""
    return torch.autocast(device.type, enabled=False)
