"""The base class of all tasks: one class holds the head, loss, targets, metric and drawing of a task kind."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.utils import ModelOutput

from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict, did_you_mean, explain
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.frequencies import count_classes
from allinone_ds.tasks.test_time import TestTime, View

_ERRORS = re.compile(r"(loss|error|err|mse|mae|mape|epe|rel|distance|nll|perplexity)(_|\b|$)")
"""Names of metrics of which smaller values are better."""

Prediction = dict[str, Any]
"""One image's prediction; the keys depend on the task, see its `predict`."""


class Task(nn.Module, ABC):
    """Base class of all tasks. Subclass it in any module and name it as "module:Class" in a run's YAML file.

    A subclass sets `kind` and `main_metric`, builds its head in `__init__` (after `super().__init__`), and implements
    `forward`, `collate`, `predict`, `metric` and `draw`. All other methods have defaults. The backbone is not part of
    a task: `forward` receives its feature maps.

    Args:
        name: name of the task in the run.
        classes: class names by label.
        channels: channels C of each feature map.
        stride: pixels per cell of the feature maps.
        num_levels: number of feature maps.
        image_size: (H, W) of the network's input in pixels, multiples of `stride`.
        head: a key of `HEADS`; None selects the first.
        options: fields of that head's options class.

    Raises:
        ConfigError: `image_size`, `head` or one of the options is invalid.

    Attributes:
        kind: kind of data set that the task reads: "detection", "segmentation", "classification", or a new one.
        main_metric: the key of `metric().compute()` that enters the run's score, whose largest mean over tasks selects
            the best checkpoint. Its values lie in 0..1. An error e, of which smaller is better, counts as 1 / (1 + e).
        greater_is_better: for every key of `metric().compute()` whether larger values are better. Without an entry,
            larger values of the main metric are better; a main metric whose name reads like an error needs one.
        pipeline_tag: what model hubs call the kind, for the model card; None if they have no name for it.
        HEADS: options class of each head by name; empty if the task has one head, which reads `options` itself.
        size_multiple: number of pixels of which both sides of an input are multiples; `build_task` sets the backbone's.

    Example:
        >>> import torch
        >>> from transformers.modeling_outputs import ImageClassifierOutput
        >>> from allinone_ds.tasks.classification import ClassificationTask
        >>> class BrightnessTask(ClassificationTask):
        ...     def forward(self, features, pixel_values, labels=None):
        ...         logits = torch.stack([-pixel_values.mean((1, 2, 3)), pixel_values.mean((1, 2, 3))], dim=1)  # (B, 2)
        ...         return ImageClassifierOutput(logits=logits)
        >>> task = BrightnessTask("light", ["dark", "bright"], channels=8, stride=4, num_levels=1, image_size=(8, 8))
        >>> outputs = task((torch.zeros(1, 8, 2, 2),), torch.ones(1, 3, 8, 8))
        >>> task.classes[task.predict(outputs, sizes=[(8, 8)])[0]["label"]]
        'bright'
    """

    kind: ClassVar[str]
    main_metric: ClassVar[str]
    greater_is_better: ClassVar[Mapping[str, bool]] = {}
    pipeline_tag: ClassVar[str | None] = None
    HEADS: ClassVar[Mapping[str, type[Strict]]] = {}
    has_classes: ClassVar[bool] = True
    """Whether the data has class names; without, `classes` is empty."""
    shown_score: float | None = None
    """Predictions with a lower score are neither drawn nor written to JSON; None: predictions have no such score."""
    frequencies: list[float] | None = None
    """What `use_frequencies` received at the start of training; None: nothing was counted."""

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
        self.size_multiple = stride
        if any(side % stride for side in self.image_size):
            raise ConfigError(f"tasks.{name}.image_size = {list(self.image_size)}: both sides must be multiples of "
                              f"{stride}, the backbone's patch size")  # fmt: skip
        self.head_name, self.options = self._head_options(head, options)
        if self.main_metric not in self.greater_is_better and _ERRORS.search(self.main_metric.lower()):
            raise ConfigError(
                f"tasks.{name}: the main metric '{self.main_metric}' of {type(self).__name__} reads like an error, of "
                "which smaller is better; declare it in the class, for example "
                f"greater_is_better = {{'{self.main_metric}': False}}"
            )

    def _head_options(self, head: str | None, options: dict[str, Any]) -> tuple[str | None, Any]:
        """Return the name of the head and its options, validated where the task has options classes."""
        if not self.HEADS:
            if head is not None:
                raise ConfigError(f"tasks.{self.name}.head = '{head}': this task has only one head; remove the key")
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
        """Return the raw predictions, and the loss if labels are given.

        The loss is a sum over the micro-batch of one rank, divided by `count_labels` of it, or by 1 if that is 0. The
        trainer weights losses so that a task's gradient is the sum over all micro-steps and ranks, divided by the
        labels of all of them: it does not depend on how the images are divided into micro-batches.

        Args:
            features: `num_levels` maps (B, C, H / stride, W / stride), in the dtype of the weights.
            pixel_values: (B, 3, H, W) normalised images.
            labels: what `collate` returned under "labels".

        Returns:
            A `ModelOutput` whose `loss` is a float32 scalar, or None without labels. The loss must depend on every
            weight of the head even if the batch contains no target.
        """

    @staticmethod
    @abstractmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the batch {"pixel_values", "labels"} of transformed samples of equal size.

        `pixel_values` (B, 3, H, W) are uint8 (`stack_pixels`) or normalised (`stack_images`).
        """

    def count_labels(self, labels: Any) -> int | None:
        """Return how many things (valid pixels, objects) the loss of a micro-batch is divided by, 1 instead of 0.

        The default, None, stands for the number of images.

        Args:
            labels: what `collate` returned under "labels", on the CPU.
        """
        return None

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return a sample with the same image whose targets are empty or ignored.

        A joint group needs it for batches in which no image has a label of the task. `forward` must give a finite loss
        for it that depends on every weight of the head; this loss then counts nothing.

        Args:
            sample: a transformed sample, which may lack the keys of the kind.
        """
        raise ConfigError(
            "a batch of a joint group has no label of one of its tasks, whose class has no method `unlabelled`; add "
            "it, see docs/adding-a-task.md"
        )

    @abstractmethod
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the final prediction of each image, in pixels of the original image.

        Args:
            outputs: what `forward` returned.
            sizes: (H, W) of each original image in pixels.
        """

    @abstractmethod
    def metric(self) -> Any:
        """Return a new metric with `update(predictions, samples)`, `reset()`, `to(device)` and `compute()`.

        `compute` synchronises all ranks and returns {name: value}, among them `main_metric`.
        """

    def details(self, metric: Any) -> Details:
        """Return what an evaluation found for each class, the same on every rank; by default nothing.

        Args:
            metric: what `metric` returned, after `compute`.
        """
        return {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return how good the prediction of one image is, larger is better, to find the worst; None: not known."""
        return None

    @abstractmethod
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        """Return the prediction drawn on the image, next to the truth if `sample` is given.

        Args:
            image: uint8 (3, H, W).
            prediction: an element of what `predict` returned.
            sample: the original sample.

        Returns:
            uint8 (3, H', W').
        """

    def better_is_greater(self, metric: str) -> bool | None:
        """Return whether larger values of a metric are better; None if the class does not say."""
        if metric in self.greater_is_better:
            return self.greater_is_better[metric]
        if metric != self.main_metric:
            return None
        declared = getattr(self.metric(), "higher_is_better", None)  # an attribute of torchmetrics' classes
        return declared if isinstance(declared, bool) else True

    def known_metrics(self) -> list[str]:
        """Return the names of the metrics whose direction is known, the main metric first."""
        return list(dict.fromkeys([self.main_metric, *self.greater_is_better]))

    def check_threshold(self, threshold: float) -> None:
        """Check a lowest score of predictions.

        Raises:
            ConfigError: the task's predictions have no score to compare, or the number cannot be reached.
        """
        if self.shown_score is None:
            raise ConfigError(
                f"threshold {threshold}: predictions of '{self.name}' ({self.kind}) have no score to compare; "
                "leave it out"
            )
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold {threshold}: a score lies in 0..1; give a number in that range")

    def at_least(self, prediction: Prediction, threshold: float) -> Prediction:
        """Return the part of a prediction whose scores are at least `threshold`.

        Raises:
            ConfigError: see `check_threshold`.
        """
        self.check_threshold(threshold)
        keep = prediction["scores"] >= threshold
        return {key: value[keep] for key, value in prediction.items()}

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the prediction as plain numbers and lists."""
        return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in prediction.items()}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the truth of a sample drawn on its image, uint8 (3, H, W), and one line of text that describes it.

        `allinone-ds preview` calls it, without building the task. The default draws nothing.

        Args:
            sample: a transformed sample.
            classes: class names of its data set.
        """
        return sample["image"].as_subclass(Tensor), ""

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return the outputs of the task's ONNX graph by name, in their order.

        The default returns every tensor of `outputs`.

        Args:
            outputs: what `forward` returned without labels.
        """
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def example_labels(self, batch_size: int) -> Any:
        """Return labels of `batch_size` images, to count the activations that the loss keeps for the backward pass.

        The default, None, leaves the loss out of the count. It is right for losses whose activations depend on values.
        """
        return None

    def constant_loss(self) -> str | None:
        """Return why the loss is the same whatever the head predicts, and what to do; None, the default: it is not.

        A run with such a task does not start. A subclass with a loss of its own returns None.
        """
        return None

    def samples_to_count(self) -> int:
        """Return how many training samples to read for `use_samples`; 0, the default: the task needs none."""
        return 0

    def use_samples(self, samples: Iterable[Sample]) -> str | None:
        """Set what depends on the training data, before training begins.

        The default counts the classes for `use_frequencies`. Called only with a `samples_to_count` above 0.

        Args:
            samples: as many training samples, evenly spread over the data, the same on every rank.

        Returns:
            What was found, for the log; None if no sample has a target.
        """
        return count_classes(self, samples)

    def class_shares(self, sample: Sample) -> Tensor | None:
        """Return which part of a sample's targets each class has (K,); None for no target.

        The sum is 1, unless the classes do not exclude each other; then NaN stands for an unknown one. A kind without
        classes returns other numbers of its targets, which `use_frequencies` understands.
        """
        raise NotImplementedError

    def use_frequencies(self, frequencies: Sequence[float]) -> str | None:
        """Set what depends on the frequencies of the classes in the training data, before training begins.

        Args:
            frequencies: K fractions, the means of `class_shares`.

        Returns:
            What the log says of them; None: the frequencies of the classes.
        """
        return None

    def check_test_time(self, options: TestTime) -> None:
        """Check that the task can predict and merge the views; by default it can merge none.

        Raises:
            ConfigError: names the option and what is allowed.
        """
        raise ConfigError(f"tasks.{self.name}.test_time: '{self.kind}' cannot merge views; remove it")

    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return one prediction per image, as `predict` does, merged from several views of the images.

        Args:
            views: outputs for each view.
            sizes: (H, W) of each original image in pixels.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict_views")

    @contextlib.contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        """Expect network inputs of a different size inside this context.

        Args:
            size: (H, W) in pixels, multiples of `stride`.
        """
        before, self.image_size = self.image_size, size
        try:
            yield
        finally:
            self.image_size = before


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast, in which losses are computed."""
    return torch.autocast(device.type, enabled=False)
