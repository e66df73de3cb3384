"""What the tasks with numbers per pixel share: heads, batches, views, and tasks that say yes or no of each pixel."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import IGNORE, Sample
from allinone_ds.models.class_loss import smoothed
from allinone_ds.models.dense.decoders import DenseDecoder, DptDecoder, LightDecoder
from allinone_ds.strict import Strict
from allinone_ds.tasks.base import Prediction, Task, full_precision
from allinone_ds.tasks.test_time import TestTime, View, merged_views, resized

COUNTED_MAPS = 64
"""Training images that are read at the start for what every pixel starts with."""

_DECODERS: dict[str, Any] = {"light": LightDecoder, "dpt": DptDecoder}


@dataclass
class DenseOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean loss over the valid pixels of the micro-batch, float32.
        maps: (B, C, h, w) at the head's resolution.
    """

    loss: Tensor | None = None
    maps: Tensor | None = None


class DenseTask(Task):
    """Base class of the tasks whose target is a map of numbers, under the name of the kind in samples and predictions.

    A subclass sets `per_pixel` and implements `loss`, `values`, `prediction` and `unlabelled`.

    Attributes:
        per_pixel: numbers C that the head predicts per pixel.
    """

    per_pixel: ClassVar[int] = 1
    has_classes = False

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.decoder: DenseDecoder = _DECODERS[str(self.head_name)](
            self.per_pixel, self.channels, self.num_levels, self.options
        )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        maps = self.decoder(features)
        out = DenseOutput(maps=maps)
        if labels is not None:
            with full_precision(pixel_values.device):
                out.loss = self.loss(resized(maps, labels.shape[-2:]), labels)
        return out

    @abstractmethod
    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the valid pixels of the batch; 0, with a gradient, without any.

        Args:
            maps: (B, C, H, W) float32 at the resolution of the labels.
            labels: what `collate` returned.
        """

    @abstractmethod
    def values(self, maps: Tensor) -> Tensor:
        """Return what may be averaged over views: (B, C, h, w) float32, of the head's output (B, C, h, w)."""

    @abstractmethod
    def prediction(self, values: Tensor) -> Prediction:
        """Return the prediction of one image from its `values` (C, H, W) at the size of the image."""

    def unflipped(self, values: Tensor) -> Tensor:
        """Return the values of a mirrored image (..., h, w) as they are in the image."""
        return values.flip(-1)

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image its map under the name of the kind."""
        values = self.values(outputs.maps)
        return [self.prediction(resized(v[None], size)[0]) for v, size in zip(values, sizes, strict=True)]

    def check_test_time(self, options: TestTime) -> None:
        """Accept all views: each can be merged."""

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return maps of the mean values: over the windows that contain a pixel, then over the views."""
        means = merged_views(views, sizes, self.image_size, lambda out: self.values(out.maps), self.unflipped)
        return [self.prediction(mean[0]) for mean in means]

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, *self.image_size)


def collate_maps(samples: Sequence[Sample], key: str, kind: type[tv_tensors.TVTensor]) -> dict[str, Any]:
    """Return the batch of samples with a map under `key`, which must be a `kind`.

    Raises:
        TypeError: the map is of another class, of which pixels without a value cannot be told.
    """
    for sample in samples:
        if not isinstance(sample[key], kind):
            raise TypeError(f"sample['{key}'] is a {type(sample[key]).__name__}; give a {kind.__name__}")
    labels = torch.stack([sample[key].as_subclass(Tensor) for sample in samples])
    return {"pixel_values": stack_pixels(samples), "labels": labels}


def without_values(sample: Sample, key: str, empty: tv_tensors.TVTensor) -> Sample:
    """Return a view of a sample's image whose map under `key` has no value in any pixel.

    Args:
        sample: the sample; its own map is not used.
        key: the kind.
        empty: a map of one pixel (..., 1, 1) without a value.
    """
    size = sample["image"].shape[-2:]
    plain = empty.as_subclass(Tensor).expand(*empty.shape[:-2], *size).clone()
    return {**sample, key: tv_tensors.wrap(plain, like=empty)}


class BinaryMapOptions(Strict):
    """Options of the heads that say yes or no of each pixel.

    Example:
        >>> BinaryMapOptions().prior
        'data'
    """

    prior: Literal["data", "even"] = "data"
    """Probability that every pixel starts with: "data": the fraction of the pixels of the training data that are
    positive, or 0.5 where the loss is balanced; "even": 0.5."""


class BinaryMapTask(DenseTask):
    """Base class of the tasks that say yes or no of each pixel. Labels: (B, H, W) uint8: 0, 1, and 255 (ignore)."""

    def values(self, maps: Tensor) -> Tensor:
        """Return probabilities."""
        return maps.float().sigmoid()

    def prediction(self, values: Tensor) -> Prediction:
        return {self.kind: values[0]}

    def count_labels(self, labels: Tensor) -> int:
        """Return the number of valid pixels."""
        return int(torch.count_nonzero(labels != IGNORE))

    def samples_to_count(self) -> int:
        return COUNTED_MAPS if self.options.prior == "data" and self.decoder.untrained else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        """Return the fractions of the valid pixels that are no (edge, salient) and that are (2,)."""
        truth = sample[self.kind].as_subclass(Tensor)
        counts = torch.stack([(truth == 0).sum(), (truth == 1).sum()])
        return counts / counts.sum() if counts.any() else None

    def use_frequencies(self, frequencies: Sequence[float]) -> str:
        """Start with the frequency in the training data as the probability of every pixel."""
        _, share = smoothed(frequencies)
        self.decoder.start_with(math.log(share / (1 - share)))
        return f"{frequencies[1]:.2%} of the pixels are positive"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return the probabilities (B, h, w) under the name of the kind."""
        return {self.kind: self.values(outputs.maps)[:, 0]}

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, *self.image_size, dtype=torch.uint8)


def binary_losses(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy of every pixel (B, H, W), 0 where there is no value; which are 1; and which are 0.

    Args:
        maps: logits (B, 1, H, W) float32.
        labels: (B, H, W) uint8: 0, 1, 255.
    """
    positive, negative = labels == 1, labels == 0
    each = F.binary_cross_entropy_with_logits(maps[:, 0], positive.float(), reduction="none")
    return each * (positive | negative), positive, negative


def mean_over(total: Tensor, valid: Tensor) -> Tensor:
    """Return a sum of losses divided by the number of valid pixels, at least 1."""
    return total / valid.sum().clamp(min=1)


def directions(larger: Sequence[str], smaller: Sequence[str] = ()) -> Mapping[str, bool]:
    """Return for every metric whether larger values are better."""
    return {**dict.fromkeys(larger, True), **dict.fromkeys(smaller, False)}
