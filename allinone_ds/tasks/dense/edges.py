"""Edges: whether each pixel is one; heads `light` and `dpt`; F-measure with a distance tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchmetrics import Metric

from allinone_ds.data.base import IGNORE, Sample
from allinone_ds.data.dense_maps import EdgeMap
from allinone_ds.models.dense.decoders import DptDecoderOptions, LightDecoderOptions
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.dense.base import (
    BinaryMapOptions,
    BinaryMapTask,
    binary_losses,
    collate_maps,
    directions,
    mean_over,
    without_values,
)
from allinone_ds.tasks.dense.drawing import ink, large
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.drawing import beside, caption

_STEPS = 40  # thresholds of 1/40 to 39/40


class EdgesOptions(BinaryMapOptions):
    """Options of the edge heads.

    Example:
        >>> EdgesOptions(balanced=False).threshold
        0.5
    """

    balanced: bool = True
    """Weigh the pixels so that edges and the rest count equally in every image."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which a pixel is an edge in the metric `f1` and in the picture's counts."""
    tolerance: float = Field(0.0075, ge=0, lt=1)
    """Distance within which a predicted and a true edge match in the metrics, in diagonals of the image."""


class LightEdgesOptions(LightDecoderOptions, EdgesOptions):
    """Options of the head `light`."""


class DptEdgesOptions(DptDecoderOptions, EdgesOptions):
    """Options of the head `dpt`."""


class EdgesTask(BinaryMapTask):
    """Predicts the probability of each pixel to be an edge.

    Labels: (B, H, W) uint8: 0, 1, and 255 (ignore). Loss: mean over the valid pixels of the cross-entropy, which is
    multiplied by twice the fraction of the other class in the pixel's image (https://arxiv.org/abs/1504.06375) unless
    `balanced` is off.

    Example:
        >>> import torch
        >>> task = EdgesTask("edges", [], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape, task.predict(outputs, sizes=[(20, 30)])[0]["edges"].shape
        (torch.Size([]), torch.Size([20, 30]))
    """

    kind = "edges"
    main_metric = "ods"
    greater_is_better = directions(["ods", "f1", "precision", "recall"])
    HEADS = {"light": LightEdgesOptions, "dpt": DptEdgesOptions}

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        each, positive, negative = binary_losses(maps, labels)
        valid = positive | negative
        if self.options.balanced:
            pixels = valid.sum((1, 2), keepdim=True).clamp(min=1)
            of_edges = 2 * negative.sum((1, 2), keepdim=True) / pixels  # (B, 1, 1)
            of_rest = 2 * positive.sum((1, 2), keepdim=True) / pixels
            each = each * torch.where(positive, of_edges, of_rest)
        return mean_over(each.sum(), valid)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return collate_maps(samples, "edges", EdgeMap)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return a view of the image in which every pixel is ignored."""
        return without_values(sample, "edges", EdgeMap(torch.full((1, 1), IGNORE, dtype=torch.uint8)))

    def samples_to_count(self) -> int:
        return 0 if self.options.balanced else super().samples_to_count()

    def metric(self) -> EdgesMetric:
        return EdgesMetric(self.options.threshold, self.options.tolerance)

    def details(self, metric: Any) -> Details:
        return metric.details() if isinstance(metric, EdgesMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the F-measure of this image at the threshold; None if it has no true edge."""
        counts = edge_counts(
            prediction["edges"], sample["edges"].as_subclass(Tensor), [self.options.threshold], self.options.tolerance
        )
        return f_measures(counts)[0] if counts[0, 3] else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        found = caption(large(ink(prediction["edges"])), ["predicted edges"])
        pictures = beside(caption(large(image), ["image"]), found)
        if sample is None:
            return pictures
        return beside(pictures, caption(large(_truth(sample)), ["true edges"]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the fraction of the pixels that are edges; the map itself is written as a picture."""
        share = (prediction["edges"] >= self.options.threshold).float().mean()
        return {"share": round(float(share), 4)}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the edges, black on white, and grey where pixels are ignored."""
        share = (sample["edges"] == 1).float().mean()
        return _truth(sample), f"edges: {float(share):.1%} of the pixels"


def _truth(sample: Sample) -> Tensor:
    edges = sample["edges"].as_subclass(Tensor)
    return ink((edges == 1).float(), edges == IGNORE)


def edge_counts(found: Tensor, true: Tensor, thresholds: Sequence[float], tolerance: float) -> Tensor:
    """Return the counts that precision and recall of edges come from.

    A predicted edge is right if a true edge lies within the tolerance, and a true one is found if a predicted one does.

    Args:
        found: probabilities (H, W).
        true: uint8 (H, W): 0, 1, 255; ignored pixels do not count.
        thresholds: probabilities from which a pixel is an edge.
        tolerance: distance in diagonals of the image.

    Returns:
        long (thresholds, 4): predicted edges that are right, predicted edges, true edges that are found, true edges.
    """
    limit = tolerance * math.hypot(*true.shape)
    probabilities, stored = found.cpu().numpy(), true.cpu().numpy()
    edges, valid = stored == 1, stored != IGNORE
    near = np.asarray(distance_transform_edt(~edges)) <= limit if edges.any() else edges
    right, predicted = probabilities[valid & near], probabilities[valid]  # (n,)
    reached = _largest_within(np.where(valid, probabilities, -1.0), edges, limit)  # of each true edge
    rows = [
        [(numbers >= threshold).sum() for numbers in (right, predicted, reached)] + [len(reached)]
        for threshold in thresholds
    ]
    return torch.tensor(np.array(rows, dtype=np.int64))


def _largest_within(values: np.ndarray, places: np.ndarray, limit: float) -> np.ndarray:
    """Return the largest number within a distance in pixels of each place (n,).

    Args:
        values: (H, W).
        places: bool (H, W).
        limit: the distance.
    """
    radius = int(limit)
    padded = np.pad(values, radius, constant_values=-1.0)
    y, x = np.nonzero(places)
    largest = values[places]
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if math.hypot(dy, dx) <= limit:
                np.maximum(largest, padded[y + radius + dy, x + radius + dx], out=largest)
    return largest


def f_measures(counts: Tensor) -> list[float]:
    """Return the harmonic mean of precision and recall for each row of counts, 0 where nothing is right."""
    right, predicted, found, true = counts.double().unbind(1)
    precision, recall = right / predicted.clamp(min=1), found / true.clamp(min=1)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-12)).tolist()


class EdgesMetric(Metric):
    """F-measures of edges with a distance tolerance, from the counts of all images of all ranks.

    ods: the largest over thresholds of 1/40 to 39/40, the same for all images ("optimal dataset scale"); f1: that at a
    fixed threshold. Unlike the BSDS benchmark, predictions are not thinned, and several predicted pixels may match the
    same true one, so that thick predictions within the tolerance are not punished.

    Args:
        threshold: the fixed threshold.
        tolerance: distance within which edges match, in diagonals of the image.
    """

    counts: Tensor

    def __init__(self, threshold: float = 0.5, tolerance: float = 0.0075) -> None:
        super().__init__()
        self.thresholds = [step / _STEPS for step in range(1, _STEPS)]
        self.threshold, self.tolerance = threshold, tolerance
        self.add_state("counts", torch.zeros(_STEPS, 4, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        thresholds = [*self.thresholds, self.threshold]
        for prediction, sample in zip(predictions, samples, strict=True):
            true = sample["edges"].as_subclass(Tensor)
            self.counts += edge_counts(prediction["edges"], true, thresholds, self.tolerance).to(self.device)

    def compute(self) -> dict[str, float]:
        """Return {"ods", "f1", "precision", "recall"}, the last two at the fixed threshold, the same on every rank."""
        self.counted = self.counts.cpu()
        *of_steps, fixed = f_measures(self.counted)
        right, predicted, found, true = self.counted[-1].tolist()
        return {
            "ods": max(of_steps),
            "f1": fixed,
            "precision": right / max(predicted, 1),
            "recall": found / max(true, 1),
        }

    def details(self) -> Details:
        """Return the threshold of `ods`, as found by `compute`."""
        of_steps = f_measures(self.counted)[:-1]
        return {"metrics": {"ods_threshold": self.thresholds[int(np.argmax(of_steps))]}}
