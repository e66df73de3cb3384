"""Image classification: one class for an image; heads linear and ArcFace; top-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.models.arcface import ArcFace, ArcFaceOptions
from allinone_ds.strict import Strict
from allinone_ds.tasks.base import Prediction, Sample, Task, full_precision
from allinone_ds.tasks.drawing import caption, enlarge


class LinearOptions(Strict):
    """Options of classification's head `linear`."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the pooled features dropped in training."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""


@dataclass
class ClassificationOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean cross-entropy over images, float32.
        logits: (B, K); without ArcFace's margins.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class ClassificationTask(Task):
    """Gives an image one of `classes`: mean over all cells of all maps, LayerNorm, then a linear classifier, or one by
    angles (ArcFace). Labels: (B,) long."""

    kind = "classification"
    main_metric = "top1"
    unit = "images"
    HEADS = {"linear": LinearOptions, "arcface": ArcFaceOptions}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        width = self.channels * self.num_levels
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(self.options.dropout)
        self.classifier: nn.Module
        if self.head_name == "arcface":
            self.classifier = ArcFace(len(self.classes), width, self.options)
            return
        self.classifier = nn.Linear(width, len(self.classes))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        pooled = torch.cat([level.mean(dim=(-2, -1)) for level in features], dim=1)  # (B, L * C)
        pooled = self.dropout(self.norm(pooled))
        if isinstance(self.classifier, ArcFace):
            logits, hardened = self.classifier(pooled, labels if self.training else None)
            loss = None if labels is None else F.cross_entropy(hardened, labels)
            return ClassificationOutput(loss=loss, logits=logits)
        logits = self.classifier(pooled)
        out = ClassificationOutput(logits=logits)
        if labels is not None:
            with full_precision(pixel_values.device):
                smoothing = self.options.label_smoothing if self.training else 0.0
                out.loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        return out

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = torch.tensor([int(sample["label"]) for sample in samples])
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """For each image the "label" (int) and the "scores" (K,), probabilities of all classes."""
        return [{"label": int(p.argmax()), "scores": p} for p in outputs.logits.float().softmax(-1)]

    def metric(self) -> ClassificationMetric:
        return ClassificationMetric(len(self.classes))

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        large, _ = enlarge(image.cpu())
        found = prediction["label"]
        lines = [f"{self.classes[found]} {float(prediction['scores'][found]):.2f}"]
        if sample is not None:
            lines.append(f"true: {self.classes[int(sample['label'])]}")
        return caption(large, lines)

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """The class and the five best probabilities."""
        scores, best = prediction["scores"].topk(min(5, len(self.classes)))
        names = [self.classes[k] for k in best.tolist()]
        return {
            "class": self.classes[prediction["label"]],
            "scores": {name: round(score, 4) for name, score in zip(names, scores.tolist(), strict=True)},
        }


class ClassificationMetric(MulticlassAccuracy):
    """Top-1: share of the images (of all ranks) whose best class is the true one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, average="micro", validate_args=False)

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:  # type: ignore[override]
        """Add images: predictions of `predict` and the original samples."""
        if not samples:
            return
        found = torch.tensor([prediction["label"] for prediction in predictions], device=self.device)
        super().update(found, torch.tensor([int(sample["label"]) for sample in samples], device=self.device))

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """{"top1"}."""
        return {"top1": float(super().compute())}
