"""Saliency: whether each pixel stands out; heads `light` and `dpt`; largest F-measure and mean absolute error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision import tv_tensors

from allinone_ds.data.base import IGNORE, Sample
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
from allinone_ds.tasks.drawing import beside, caption

_BETA = 0.3
"""Weight beta^2 of the recall in the F-measure, as in all papers on saliency: precision counts more."""
_THRESHOLDS = 256


class LightSaliencyOptions(LightDecoderOptions, BinaryMapOptions):
    """Options of the head `light`."""


class DptSaliencyOptions(DptDecoderOptions, BinaryMapOptions):
    """Options of the head `dpt`."""


class SaliencyTask(BinaryMapTask):
    """Predicts the probability of each pixel to be salient.

    Labels: (B, H, W) uint8: 0, 1, and 255 (ignore). Loss: mean cross-entropy over the valid pixels.

    Example:
        >>> import torch
        >>> task = SaliencyTask("saliency", [], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape, task.predict(outputs, sizes=[(20, 30)])[0]["saliency"].shape
        (torch.Size([]), torch.Size([20, 30]))
    """

    kind = "saliency"
    main_metric = "max_f"
    greater_is_better = directions(["max_f"], ["mae"])
    HEADS = {"light": LightSaliencyOptions, "dpt": DptSaliencyOptions}

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        each, positive, negative = binary_losses(maps, labels)
        return mean_over(each.sum(), positive | negative)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return collate_maps(samples, "saliency", tv_tensors.Mask)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return a view of the image in which every pixel is ignored."""
        return without_values(sample, "saliency", tv_tensors.Mask(torch.full((1, 1), IGNORE, dtype=torch.uint8)))

    def metric(self) -> SaliencyMetric:
        return SaliencyMetric()

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return 1 - the mean absolute error of this image; None without a valid pixel."""
        true = sample["saliency"].as_subclass(Tensor)
        valid = true != IGNORE
        if not valid.any():
            return None
        return 1 - float((prediction["saliency"].cpu()[valid] - true[valid].float()).abs().mean())

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        found = caption(large(ink(1 - prediction["saliency"])), ["predicted: white is salient"])
        pictures = beside(caption(large(image), ["image"]), found)
        return pictures if sample is None else beside(pictures, caption(large(_truth(sample)), ["true"]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the fraction of the pixels that are salient, and the box (x1, y1, x2, y2) around them in pixels."""
        salient = prediction["saliency"] >= 0.5
        rows, columns = salient.any(1).nonzero()[:, 0].tolist(), salient.any(0).nonzero()[:, 0].tolist()
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else None
        return {"share": round(float(salient.float().mean()), 4), "box": box}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with all but its salient pixels darkened, and their number."""
        true = sample["saliency"].as_subclass(Tensor)
        image = sample["image"].as_subclass(Tensor)
        share = float((true == 1).float().mean())
        shown = torch.where(true == 1, image, image // 4)
        return torch.where(true == IGNORE, _truth(sample), shown), f"salient: {share:.1%} of the pixels"


def _truth(sample: Sample) -> Tensor:
    true = sample["saliency"].as_subclass(Tensor)
    return ink((true != 1).float(), true == IGNORE)


class SaliencyMetric(Metric):
    """Largest F-measure with beta^2 = 0.3, and mean absolute error, both means over the images of all ranks.

    For each of 256 thresholds, the F-measure is averaged over the images with a salient pixel; max_f is the largest of
    these means. mae is the mean over the valid pixels of |probability - truth|, averaged over the images with one.
    """

    f_sums: Tensor
    with_salient: Tensor
    error: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("f_sums", torch.zeros(_THRESHOLDS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("with_salient", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            stored = sample["saliency"].as_subclass(Tensor).to(self.device)
            valid = stored != IGNORE
            true, found = stored[valid] == 1, prediction["saliency"].to(self.device)[valid].double()
            if not true.numel():
                continue
            self.images += 1
            self.error += (found - true.double()).abs().mean()
            if true.any():
                self.with_salient += 1
                self.f_sums += _f_measures(found, true)

    def compute(self) -> dict[str, float]:
        """Return {"max_f", "mae"}, the same on every rank; without a valid pixel 0 and NaN."""
        images, salient = int(self.images), int(self.with_salient)
        return {
            "max_f": float(self.f_sums.max()) / salient if salient else 0.0,
            "mae": float(self.error) / images if images else float("nan"),
        }


def _f_measures(found: Tensor, true: Tensor) -> Tensor:
    """Return the F-measure at every threshold (256,): pixels of at least t / 255 are salient.

    Args:
        found: probabilities (n,).
        true: bool (n,), at least one of them true.
    """
    places = (found * (_THRESHOLDS - 1)).floor().long().clamp(0, _THRESHOLDS - 1)
    right = _at_least(torch.bincount(places[true], minlength=_THRESHOLDS))
    predicted = _at_least(torch.bincount(places, minlength=_THRESHOLDS))
    precision, recall = right / predicted.clamp(min=1), right / true.sum()
    return (1 + _BETA) * precision * recall / (_BETA * precision + recall).clamp(min=1e-12)


def _at_least(counts: Tensor) -> Tensor:
    """Return how many lie in each bin or a higher one, float64."""
    return counts.flip(0).cumsum(0).flip(0).double()
