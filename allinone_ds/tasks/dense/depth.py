"""Depth: one number per pixel; heads `light` and `dpt`; delta below 1.25, RMSE and relative error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics import Metric

from allinone_ds.data.base import Sample
from allinone_ds.data.dense_maps import DenseMap
from allinone_ds.errors import ConfigError
from allinone_ds.models.dense.decoders import DptDecoderOptions, LightDecoderOptions
from allinone_ds.strict import Strict
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.dense.base import COUNTED_MAPS, DenseTask, collate_maps, directions, mean_over, without_values
from allinone_ds.tasks.dense.drawing import coloured, large, number_text, value_range, with_bar
from allinone_ds.tasks.drawing import beside, caption
from allinone_ds.tasks.test_time import TestTime

_LARGEST_LOG = 30.0
"""Logarithms of predicted depths lie in -30..30, so that no prediction overflows."""


class DepthOptions(Strict):
    """Options of the depth heads.

    Example:
        >>> DepthOptions(loss="l1").variance_focus
        0.85
    """

    loss: Literal["silog", "l1"] = "silog"
    """silog: scale-invariant error of the logarithm; l1: absolute error in the unit of the depth."""
    variance_focus: float = Field(0.85, ge=0, le=1)
    """Silog: 0 counts the error of the whole image's scale in full, 1 not at all."""
    prior: Literal["data", "one"] = "data"
    """Depth that every pixel starts with: "data": the median of the training data; "one": 1."""


class LightDepthOptions(LightDecoderOptions, DepthOptions):
    """Options of the head `light`."""


class DptDepthOptions(DptDecoderOptions, DepthOptions):
    """Options of the head `dpt`."""


class DepthTask(DenseTask):
    """Predicts the depth of each pixel, of which the head predicts the logarithm.

    Labels: (B, H, W) float32 above 0, NaN without a value. Loss: with g = log(predicted) - log(true), of each image
    mean(g^2) - variance_focus * mean(g)^2 (https://arxiv.org/abs/1406.2283, equation 4, with its weight 0.5 as an
    option), averaged over the images with their numbers of valid pixels as weights; or the mean absolute error.

    Example:
        >>> import torch
        >>> task = DepthTask("depth", [], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.full((1, 16, 16), 2.5)
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape, task.predict(outputs, sizes=[(20, 30)])[0]["depth"].shape
        (torch.Size([]), torch.Size([20, 30]))
    """

    kind = "depth"
    main_metric = "delta1"
    greater_is_better = directions(["delta1", "delta2", "delta3"], ["rmse", "abs_rel", "mae"])
    pipeline_tag = "depth-estimation"
    HEADS = {"light": LightDepthOptions, "dpt": DptDepthOptions}

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        valid = labels.isfinite()
        log = maps[:, 0].clamp(-_LARGEST_LOG, _LARGEST_LOG)
        true = torch.where(valid, labels, 1.0)
        if self.options.loss == "l1":
            return mean_over(((log.exp() - true) * valid).abs().sum(), valid)
        gap = (log - true.log()) * valid  # (B, H, W)
        pixels = valid.sum((1, 2)).clamp(min=1)  # (B,)
        mean = gap.sum((1, 2)) / pixels
        each = gap.square().sum((1, 2)) / pixels - self.options.variance_focus * mean.square()
        return mean_over((each * pixels).sum(), valid)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return collate_maps(samples, "depth", DenseMap)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return a view of the image without any depth."""
        return without_values(sample, "depth", DenseMap(torch.full((1, 1), math.nan)))

    def count_labels(self, labels: Tensor) -> int:
        """Return the number of valid pixels."""
        return int(torch.count_nonzero(labels.isfinite()))

    def samples_to_count(self) -> int:
        return COUNTED_MAPS if self.options.prior == "data" and self.decoder.untrained else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        """Return the logarithm of the median depth (1,)."""
        depth = sample["depth"].as_subclass(Tensor)
        known = depth[depth.isfinite()]
        return known.log().median()[None] if known.numel() else None

    def use_frequencies(self, frequencies: Sequence[float]) -> str:
        """Start with the median depth of the training data in every pixel."""
        self.decoder.start_with(frequencies[0])
        return f"the median depth is {number_text(math.exp(frequencies[0]))}"

    def values(self, maps: Tensor) -> Tensor:
        """Return logarithms."""
        return maps.float().clamp(-_LARGEST_LOG, _LARGEST_LOG)

    def prediction(self, values: Tensor) -> Prediction:
        return {"depth": values[0].exp()}

    def check_test_time(self, options: TestTime) -> None:
        """Accept flips, but no scales: in an enlarged image everything looks nearer."""
        if options.scales != [1.0] or options.windows:
            raise ConfigError(
                f"tasks.{self.name}.test_time: depth changes with the scale of a view; only 'flip' can be merged, "
                "remove 'scales' and 'windows'"
            )

    def metric(self) -> DepthMetric:
        return DepthMetric()

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the fraction of the image's pixels within a factor of 1.25; None without a valid pixel."""
        metric = DepthMetric()
        metric.update([prediction], [sample])
        return metric.values()["delta1"] if metric.pixels else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        true = None if sample is None else sample["depth"].as_subclass(Tensor)
        low, high = value_range(prediction["depth"] if true is None else true)

        def drawn(depth: Tensor, title: str) -> Tensor:
            return caption(with_bar(large(coloured(depth, low, high)), low, high), [title])

        pictures = beside(caption(large(image), ["image"]), drawn(prediction["depth"], "predicted depth"))
        return pictures if true is None else beside(pictures, drawn(true, "true depth"))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the least, median and largest depth; the map itself is written as a picture."""
        depth = prediction["depth"].float()
        found = {"least": depth.min(), "median": depth.median(), "largest": depth.max()}
        return {name: float(f"{float(value):.5g}") for name, value in found.items()}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the depth in colours, light for near, and its range."""
        depth = sample["depth"].as_subclass(Tensor)
        low, high = value_range(depth)
        return coloured(depth, low, high), f"depth {number_text(low)} (light) to {number_text(high)}"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "depth" (B, h, w)."""
        return {"depth": self.values(outputs.maps)[:, 0].exp()}


class DepthMetric(Metric):
    """Errors of depth, pooled over the valid pixels of all images of all ranks.

    rmse: root of the mean squared error; mae: mean absolute error; abs_rel: mean of |predicted - true| / true; delta1,
    delta2, delta3: fraction of the pixels within a factor of 1.25, 1.25^2, 1.25^3.
    """

    squared: Tensor
    absolute: Tensor
    relative: Tensor
    within: Tensor
    pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("squared", "absolute", "relative"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            true = sample["depth"].as_subclass(Tensor).to(self.device)
            valid = true.isfinite()
            found, true = prediction["depth"].to(self.device)[valid].double(), true[valid].double()
            gap = (found - true).abs()
            factor = torch.maximum(found / true, true / found)
            self.squared += gap.square().sum()
            self.absolute += gap.sum()
            self.relative += (gap / true).sum()
            self.within += torch.stack([(factor < 1.25**power).sum() for power in (1, 2, 3)])
            self.pixels += valid.sum()

    def compute(self) -> dict[str, float]:
        """Return the values by name, the same on every rank; without a valid pixel, NaN and fractions of 0."""
        return self.values()

    def values(self) -> dict[str, float]:
        """Return the values of this rank's images, or of all ranks inside `compute`."""
        pixels = int(self.pixels)

        def mean(total: Tensor) -> float:
            return float(total) / pixels if pixels else math.nan

        fractions = {f"delta{power + 1}": int(self.within[power]) / max(pixels, 1) for power in range(3)}
        return {
            **fractions,
            "rmse": math.sqrt(mean(self.squared)) if pixels else math.nan,
            "abs_rel": mean(self.relative),
            "mae": mean(self.absolute),
        }
