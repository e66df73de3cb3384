"""Image classification: one class per image; heads `linear` and `arcface`; top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassStatScores
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.models.arcface import ArcFace, ArcFaceOptions
from allinone_ds.models.linear import LinearClassifier, LinearOptions
from allinone_ds.tasks.base import Prediction, Task, full_precision
from allinone_ds.tasks.details import MAX_COUNTED, Details, class_details, ratio
from allinone_ds.tasks.drawing import caption, enlarge

_COUNTED = 20_000
"""Training images whose labels are counted at the start, if prior or class weights need it."""

_HEADS: dict[str, Any] = {"linear": (LinearClassifier, LinearOptions), "arcface": (ArcFace, ArcFaceOptions)}


@dataclass
class ClassificationOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean loss over the images of the micro-batch, float32.
        logits: (B, K), without the margins of ArcFace.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class ClassificationTask(Task):
    """Assigns one of `classes` to an image: mean over the cells of all feature maps, LayerNorm, then a classifier.

    Labels: (B,) long. Loss: mean over the images of the micro-batch.

    Example:
        >>> import torch
        >>> task = ClassificationTask("cls", ["cat", "dog"], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> outputs = task((torch.randn(2, 8, 4, 4),), torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))
        >>> outputs.loss.shape, outputs.logits.shape
        (torch.Size([]), torch.Size([2, 2]))
        >>> sorted(task.predict(outputs, sizes=[(20, 30), (20, 30)])[0])
        ['label', 'scores']
    """

    kind = "classification"
    main_metric = "top1"
    greater_is_better = {"top1": True}
    pipeline_tag = "image-classification"
    HEADS = {name: options for name, (_, options) in _HEADS.items()}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        width = self.channels * self.num_levels
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(self.options.dropout)
        self.classifier = _HEADS[str(self.head_name)][0](len(self.classes), width, self.options)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        pooled = torch.cat([level.mean(dim=(-2, -1)) for level in features], dim=1)  # (B, num_levels * C)
        pooled = self.dropout(self.norm(pooled))
        logits, loss_logits = self.classifier(pooled, labels if self.training else None)
        out = ClassificationOutput(logits=logits)
        if labels is not None:
            with full_precision(pixel_values.device):
                out.loss = self.classifier.loss(loss_logits, labels)
        return out

    def constant_loss(self) -> str | None:
        if len(self.classes) != 1 or type(self).forward is not ClassificationTask.forward:
            return None
        return (
            f"its data has one class, '{self.classes[0]}', which a softmax gives the probability 1 in every image, so "
            "the loss is always 0; add images of something else as a second class, or list present and absent in a "
            "table and use type: attributes"
        )

    def samples_to_count(self) -> int:
        return _COUNTED if self.classifier.needs_frequencies() else 0

    def class_shares(self, sample: Sample) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(int(sample["label"])), len(self.classes))

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        self.classifier.use_frequencies(frequencies)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = torch.tensor([int(sample["label"]) for sample in samples])
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        return {**sample, "label": 0}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image the "label" (int) and the "scores" (K,), the probabilities of all classes."""
        scores = outputs.logits.float().softmax(-1)  # (B, K)
        labels = scores.argmax(-1).tolist()
        return [{"label": label, "scores": row} for label, row in zip(labels, scores, strict=True)]

    def metric(self) -> ClassificationMetric:
        return ClassificationMetric(len(self.classes))

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, ClassificationMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the probability of the true class; None in a subclass whose predictions have none."""
        return float(prediction["scores"][int(sample["label"])]) if "scores" in prediction else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        large, _ = enlarge(image.cpu())
        label = prediction["label"]
        lines = [f"{self.classes[label]} {float(prediction['scores'][label]):.2f}"]
        if sample is not None:
            lines.append(f"true: {self.classes[int(sample['label'])]}")
        return caption(large, lines)

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the class and the five largest probabilities."""
        scores, labels = prediction["scores"].topk(min(5, len(self.classes)))
        names = [self.classes[k] for k in labels.tolist()]
        return {
            "class": self.classes[prediction["label"]],
            "scores": {name: round(score, 4) for name, score in zip(names, scores.tolist(), strict=True)},
        }

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image as it is and the name of its class."""
        return sample["image"].as_subclass(Tensor), classes[int(sample["label"])]

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long)


class ClassificationMetric(MulticlassStatScores):
    """Top-1 accuracy: fraction of the images of all ranks whose most probable class is the true one."""

    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, average=None, validate_args=False)
        counted = num_classes if num_classes <= MAX_COUNTED else 0
        self.add_state("confusion", torch.zeros(counted, counted, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:  # type: ignore[override]
        """Add images: their predictions and the original samples."""
        if not samples:
            return
        predicted = torch.tensor([prediction["label"] for prediction in predictions], device=self.device)
        true = torch.tensor([int(sample["label"]) for sample in samples], device=self.device)
        super().update(predicted, true)
        if len(self.confusion):
            self.confusion.index_put_((true, predicted), torch.ones_like(true), accumulate=True)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """Return {"top1"}, the same on every rank."""
        self.counts = super().compute().reshape(-1, 5).cpu()  # (K, 5): TP, FP, TN, FN, images of the class
        self.confused = self.confusion.cpu()
        right, images = self.counts[:, 0].sum(), self.counts[:, 4].sum()
        return {"top1": float(right / images) if images else 0.0}

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every class.

        Args:
            classes: K class names.
        """
        right, false, _, _, images = self.counts.unbind(1)
        columns = {
            "accuracy": ratio(right, images),
            "precision": ratio(right, right + false),
            "images": images,
            "predicted": right + false,
        }
        return class_details(classes, columns, self.confused if len(self.confused) else None)
