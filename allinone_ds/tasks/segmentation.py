"""Semantic segmentation: a class for every pixel; heads light, UPerNet and Mask2Former; mIoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.models.mask2former import Mask2FormerOptions, Mask2FormerSegmenter
from allinone_ds.models.segmenters import (
    LightOptions,
    LightSegmenter,
    UPerNetOptions,
    UPerNetSegmenter,
    segmentation_loss,
)
from allinone_ds.tasks.base import Prediction, Sample, Task, full_precision
from allinone_ds.tasks.drawing import beside, caption, draw_mask, enlarge, enlarge_mask, legend, palette
from allinone_ds.tasks.test_time import TestTime, View

IGNORE = 255
_HEADS: dict[str, Any] = {
    "light": (LightSegmenter, LightOptions),
    "upernet": (UPerNetSegmenter, UPerNetOptions),
    "mask2former": (Mask2FormerSegmenter, Mask2FormerOptions),
}


@dataclass
class SegmentationOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean cross-entropy over valid pixels, float32.
        logits: (B, K, h, w) at the head's resolution.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class SegmentationTask(Task):
    """Gives every pixel one of `classes`. Labels: (B, H, W) uint8 or long; 255 is ignored."""

    kind = "segmentation"
    main_metric = "miou"
    unit = "valid pixels"
    HEADS = {name: options for name, (_, options) in _HEADS.items()}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.segmenter = _HEADS[str(self.head_name)][0](len(self.classes), self.channels, self.num_levels, self.options)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        if isinstance(self.segmenter, Mask2FormerSegmenter):
            return self.segmenter(features, labels, IGNORE)
        logits = self.segmenter(features)
        out = SegmentationOutput(logits=logits)
        if labels is not None:
            with full_precision(pixel_values.device):
                out.loss = segmentation_loss(logits, labels, IGNORE)
        return out

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = torch.stack([sample["mask"].as_subclass(Tensor) for sample in samples])
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """For each image a "mask" (H, W) uint8 of class ids."""
        queries = isinstance(self.segmenter, Mask2FormerSegmenter)
        maps = self.segmenter.scores(outputs) if queries else outputs.logits
        return [_argmax(_resize(scores[None], size)) for scores, size in zip(maps, sizes, strict=True)]

    def check_test_time(self, options: TestTime) -> None:
        """Every view can be merged."""

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Masks of the mean class probabilities: over the windows that see a pixel, then over views."""
        total: list[Tensor | float] = [0.0] * len(sizes)
        for view in views:
            scores = self._view_scores(view)
            if view.flipped:
                scores = scores.flip(-1)
            total = [t + _resize(s[None], size) for t, s, size in zip(total, scores, sizes, strict=True)]
        return [_argmax(scores) for scores in total if isinstance(scores, Tensor)]

    def _view_scores(self, view: View) -> Tensor:
        """(B, K, H, W) class probabilities of a whole view; (B, K, h, w) as the head gives them without windows."""
        parts = [self._probabilities(outputs) for outputs in view.outputs]
        if len(parts) == 1:
            return parts[0]
        H, W = (min(side, window) for side, window in zip(view.size, self.image_size, strict=True))
        canvas = parts[0].new_zeros(*parts[0].shape[:2], *view.size)
        seen = canvas.new_zeros(view.size)
        for part, (top, left) in zip(parts, view.corners, strict=True):
            canvas[..., top : top + H, left : left + W] += _resize(part, (H, W))
            seen[top : top + H, left : left + W] += 1
        return canvas / seen

    def _probabilities(self, outputs: Any) -> Tensor:
        if isinstance(self.segmenter, Mask2FormerSegmenter):
            return self.segmenter.scores(outputs)
        return outputs.logits.float().softmax(1)

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(len(self.classes))

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        drawn = self._masks(image, prediction["mask"])
        if sample is None:
            return drawn
        return beside(caption(drawn, ["predicted"]), caption(self._masks(image, sample["mask"]), ["true"]))

    def _masks(self, image: Tensor, mask: Tensor) -> Tensor:
        large, factor = enlarge(image.cpu())
        large, present = draw_mask(large, enlarge_mask(mask.cpu(), factor), len(self.classes))
        colors = palette(len(self.classes))
        return legend(large, [(self.classes[k], colors[k]) for k in present])

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Share of the image for each class found; the mask itself is a picture."""
        mask = prediction["mask"]
        counts = torch.bincount(mask.flatten().long().cpu(), minlength=len(self.classes)) / mask.numel()
        return {"share": {self.classes[k]: round(float(s), 4) for k, s in enumerate(counts.tolist()) if s > 0}}


def _resize(scores: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(scores.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _argmax(scores: Tensor) -> Prediction:
    """Scores (1, K, H, W) as a prediction."""
    return {"mask": scores[0].argmax(0).to(torch.uint8)}


class SegmentationMetric(MulticlassConfusionMatrix):
    """mIoU: intersection over union of each class over all images of all ranks, mean over the classes that appear in
    the truth or in the predictions; pixels of value 255 in the truth do not count."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:  # type: ignore[override]
        """Add images: predictions of `predict` and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            truth = sample["mask"].as_subclass(Tensor).to(self.device).long()
            super().update(prediction["mask"].to(self.device).long(), truth)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """{"miou"}."""
        counts = super().compute().double()  # (K, K), rows: truth
        both = counts.diag()
        either = counts.sum(0) + counts.sum(1) - both
        seen = either > 0
        return {"miou": float((both[seen] / either[seen]).mean()) if seen.any() else 0.0}
