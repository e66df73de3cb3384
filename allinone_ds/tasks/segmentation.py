"""Semantic segmentation: one class per pixel; heads `light`, `upernet` and `mask2former`; mean IoU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import IGNORE, Sample
from allinone_ds.models.mask2former import Mask2FormerOptions, Mask2FormerSegmenter
from allinone_ds.models.segmenters import (
    LightOptions,
    LightSegmenter,
    SegmentationOutput,
    UPerNetOptions,
    UPerNetSegmenter,
)
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.details import Details, class_details, ratio
from allinone_ds.tasks.drawing import beside, caption, draw_mask, enlarge, enlarge_mask, legend, palette
from allinone_ds.tasks.test_time import TestTime, View, merged_views, resized

__all__ = ["SegmentationMetric", "SegmentationOutput", "SegmentationTask"]

_COUNTED = 64
"""Training images whose pixels are counted at the start, for prior and class weights."""

_HEADS: dict[str, Any] = {
    "light": (LightSegmenter, LightOptions),
    "upernet": (UPerNetSegmenter, UPerNetOptions),
    "mask2former": (Mask2FormerSegmenter, Mask2FormerOptions),
}


class SegmentationTask(Task):
    """Assigns one of `classes` to each pixel.

    Labels: (B, H, W) uint8 or long; 255 is ignored. Loss: mean over the valid pixels of the micro-batch (over its
    masks for the head `mask2former`).

    Example:
        >>> import torch
        >>> task = SegmentationTask("seg", ["road", "sky"], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.randint(0, 2, (1, 16, 16))
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape
        torch.Size([])
        >>> task.predict(outputs, sizes=[(20, 30)])[0]["mask"].shape
        torch.Size([20, 30])
    """

    kind = "segmentation"
    main_metric = "miou"
    greater_is_better = {"miou": True}
    pipeline_tag = "image-segmentation"
    HEADS = {name: options for name, (_, options) in _HEADS.items()}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.segmenter = _HEADS[str(self.head_name)][0](len(self.classes), self.channels, self.num_levels, self.options)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        return self.segmenter(features, labels, IGNORE)

    def constant_loss(self) -> str | None:
        own = type(self).forward is not SegmentationTask.forward or isinstance(self.segmenter, Mask2FormerSegmenter)
        if len(self.classes) != 1 or own:
            return None
        return (
            f"its data has one class, '{self.classes[0]}', which a softmax gives the probability 1 in every pixel, so "
            "the loss is always 0; make the rest of the image a class too, such as a background instead of ignored "
            "pixels, or use type: saliency, which tells one thing from everything else"
        )

    def count_labels(self, labels: Any) -> int:
        return self.segmenter.count_labels(labels, IGNORE)

    def samples_to_count(self) -> int:
        return _COUNTED if self.segmenter.needs_frequencies() else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        mask = sample["mask"].as_subclass(Tensor).flatten().long()
        counts = torch.bincount(mask[mask != IGNORE], minlength=len(self.classes))[: len(self.classes)]
        if isinstance(self.segmenter, Mask2FormerSegmenter):  # a class is one mask, however large
            counts = (counts > 0).long()
        return counts / counts.sum() if counts.any() else None

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        self.segmenter.use_frequencies(frequencies)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = torch.stack([sample["mask"].as_subclass(Tensor) for sample in samples])
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        size = sample["image"].shape[-2:]
        return {**sample, "mask": torch.full(size, IGNORE, dtype=torch.uint8)}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image a "mask" (H, W) uint8 of class ids."""
        scores = self.segmenter.scores(outputs)
        return [_argmax(resized(s[None], size)) for s, size in zip(scores, sizes, strict=True)]

    def check_test_time(self, options: TestTime) -> None:
        """Accept all views: each can be merged."""

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return masks of the mean class probabilities: over the windows that contain a pixel, then over the views."""
        total = merged_views(views, sizes, self.image_size, self.segmenter.probabilities)
        return [_argmax(scores) for scores in total]

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(len(self.classes))

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, SegmentationMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the mean IoU over the classes of this image; None if no pixel has a class."""
        truth = sample["mask"].as_subclass(Tensor).cpu().long()
        known = truth != IGNORE
        K = len(self.classes)
        counts = torch.bincount(truth[known] * K + prediction["mask"].cpu().long()[known], minlength=K * K)
        iou = _ious(counts.reshape(K, K))
        return float(iou.nanmean()) if known.any() else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        drawn = self._masks(image, prediction["mask"])
        if sample is None:
            return drawn
        return beside(caption(drawn, ["predicted"]), caption(self._masks(image, sample["mask"]), ["true"]))

    def _masks(self, image: Tensor, mask: Tensor) -> Tensor:
        large, factor = enlarge(image.cpu())
        large, present = draw_mask(large, enlarge_mask(mask.cpu(), factor), self.classes)
        colors = palette(len(self.classes))
        return legend(large, [(self.classes[k], colors[k]) for k in present])

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the fraction of the image for each predicted class; the mask itself is written as a picture."""
        mask = prediction["mask"]
        fractions = torch.bincount(mask.flatten().long().cpu(), minlength=len(self.classes)) / mask.numel()
        return {"share": {self.classes[k]: round(float(f), 4) for k, f in enumerate(fractions.tolist()) if f > 0}}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with the colours of its classes, dark where there is none, and their names.

        A class that is named as the background keeps the colours of the image.
        """
        mask = sample["mask"].as_subclass(Tensor)
        drawn, present = draw_mask(sample["image"].as_subclass(Tensor), mask, classes, alpha=0.35)
        return torch.where(mask >= len(classes), drawn // 4, drawn), ", ".join(classes[k] for k in present)

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "logits" (B, K, h, w), which `mask2former` does not have: "scores" (B, K, h, w) instead."""
        return {self.segmenter.score_name: self.segmenter.scores(outputs)}

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, *self.image_size, dtype=torch.uint8)


def _argmax(scores: Tensor) -> Prediction:
    """Return scores (1, K, H, W) as a prediction."""
    return {"mask": scores[0].argmax(0).to(torch.uint8)}


class SegmentationMetric(MulticlassConfusionMatrix):
    """mIoU: the intersection over union of each class over the images of all ranks, averaged over classes.

    Classes that appear neither in the truth nor in a prediction are left out, and so are pixels whose truth is 255.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:  # type: ignore[override]
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            truth = sample["mask"].as_subclass(Tensor).to(self.device).long()
            super().update(prediction["mask"].to(self.device).long(), truth)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """Return {"miou"}, the same on every rank."""
        self.counts = super().compute().cpu()  # (K, K), rows: truth
        mean = float(_ious(self.counts).nanmean())
        return {"miou": 0.0 if math.isnan(mean) else mean}

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every class.

        Args:
            classes: K class names.
        """
        right, true, predicted = self.counts.diag(), self.counts.sum(1), self.counts.sum(0)
        columns = {
            "iou": _ious(self.counts),
            "accuracy": ratio(right, true),
            "precision": ratio(right, predicted),
            "pixels": true,
            "predicted pixels": predicted,
        }
        return class_details(classes, columns, self.counts)


def _ious(counts: Tensor) -> Tensor:
    """Return the IoU of each class (K,) from a confusion matrix (K, K); NaN for a class without any pixel."""
    intersection = counts.diag()
    return ratio(intersection, counts.sum(0) + counts.sum(1) - intersection)
