"""Attributes of an image, each present or absent: head `binary`; mean average precision and F1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_average_precision
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.distributed import gather_objects
from allinone_ds.models.class_loss import smoothed
from allinone_ds.tasks.base import Prediction, full_precision
from allinone_ds.tasks.details import Details, class_details, ratio
from allinone_ds.tasks.drawing import caption, enlarge
from allinone_ds.tasks.vectors.pooling import EntriesTask, PooledOptions, known_entries, some_of, stack_entries

_COUNTED = 20_000
"""Training images whose attributes are counted at the start, for the prior."""
_UNKNOWN = -1
"""Label of an entry without a label, for torchmetrics."""
_NOTHING = "no attribute"


class BinaryOptions(PooledOptions):
    """Options of the attribute head `binary`.

    Example:
        >>> BinaryOptions(prior="uniform").positive_weight
        1.0
    """

    prior: Literal["data", "uniform"] = "data"
    """Initial probability of each attribute: "data": its frequency in the training data; "uniform": 0.5."""
    positive_weight: Literal["balanced"] | float = 1.0
    """Weight of present attributes in the loss; "balanced": for each attribute absent / present in the data."""


@dataclass
class AttributeOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean binary cross-entropy over the known entries of the micro-batch, float32.
        logits: (B, A).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class AttributesTask(EntriesTask):
    """Predicts which of `classes` an image has; they do not exclude each other.

    Labels: (B, A) float64 of 1, 0 and NaN (no label). Loss: mean over the known entries of the micro-batch.

    Example:
        >>> import torch
        >>> task = AttributesTask("face", ["smiling", "young"], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
        >>> outputs = task((torch.randn(2, 8, 4, 4),), torch.randn(2, 3, 16, 16), labels)
        >>> outputs.loss.shape, outputs.logits.shape
        (torch.Size([]), torch.Size([2, 2]))
        >>> sorted(task.predict(outputs, sizes=[(20, 30), (20, 30)])[0])
        ['present', 'scores']
    """

    kind = "attributes"
    main_metric = "map"
    greater_is_better = {"map": True, "f1": True}
    pipeline_tag = "image-classification"
    HEADS = {"binary": BinaryOptions}
    shown_score = 0.5
    """Attributes with a lower score count as absent in drawings, JSON and F1."""

    _weights: list[float] | None = None

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        logits = self.output(self.pooling(features))
        out = AttributeOutput(logits=logits)
        if labels is not None:
            with full_precision(pixel_values.device):
                out.loss = self._loss(logits.float(), labels)
        return out

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        present, known = known_entries(labels, logits)
        weights = None if self._weights is None else logits.new_tensor(self._weights)
        each = F.binary_cross_entropy_with_logits(logits, present.float(), reduction="none", pos_weight=weights)
        return (each * known).sum() / known.sum().clamp(min=1)

    def samples_to_count(self) -> int:
        untrained = self.options.prior == "data" and not bool(self.output.bias.any())
        return _COUNTED if untrained or self.options.positive_weight != 1.0 else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        shares = torch.as_tensor(sample["attributes"])
        return shares if len(shares) == len(self.classes) else None

    @torch.no_grad()
    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set the bias to the log odds of each attribute, unless it was trained, and the weights of the loss."""
        weight = self.options.positive_weight
        pairs = [smoothed([frequency, 1 - frequency]) for frequency in frequencies]  # present, absent
        if weight == "balanced":
            self._weights = [absent / present for present, absent in pairs]
        elif weight != 1.0:
            self._weights = [float(weight)] * len(pairs)
        if self.options.prior == "data" and not bool(self.output.bias.any()):
            factors = self._weights or [1.0] * len(pairs)
            odds = [math.log(w * present / absent) for w, (present, absent) in zip(factors, pairs, strict=True)]
            self.output.bias.copy_(torch.tensor(odds))

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(samples), "labels": stack_entries(samples, "attributes")}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without any known attribute."""
        return {**sample, "attributes": torch.zeros(0)}

    def values(self, outputs: Any) -> Tensor:
        """Return probabilities."""
        return outputs.logits.float().sigmoid()

    def prediction(self, values: Tensor) -> Prediction:
        """Return the "scores" (A,) of an image, the probabilities, and "present", bool (A,)."""
        return {"scores": values, "present": values >= self.shown_score}

    def at_least(self, prediction: Prediction, threshold: float) -> Prediction:
        """Return the prediction in which the attributes with at least this score are present."""
        self.check_threshold(threshold)
        return {**prediction, "present": prediction["scores"] >= threshold}

    def metric(self) -> AttributesMetric:
        return AttributesMetric(self.shown_score)

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, AttributesMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the mean probability of the true values of the known attributes."""
        truth = torch.as_tensor(sample["attributes"])
        known = ~truth.isnan()
        scores = prediction["scores"].cpu()
        right = torch.where(truth == 1, scores, 1 - scores) if len(truth) else scores
        return float(right[known].mean()) if known.any() else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        large, _ = enlarge(image.cpu())
        scores = prediction["scores"].tolist()
        shown = sorted(prediction["present"].nonzero()[:, 0].tolist(), key=lambda k: -scores[k])
        if sample is None:
            return caption(large, some_of([f"{self.classes[k]} {scores[k]:.2f}" for k in shown] or [_NOTHING]))
        truth = torch.as_tensor(sample["attributes"]).tolist() or [math.nan] * len(scores)
        said = {1.0: "right", 0.0: "wrong"}
        lines = [f"{self.classes[k]} {scores[k]:.2f}: {said.get(truth[k], 'not known')}" for k in shown]
        missed = [k for k, value in enumerate(truth) if value == 1 and k not in shown]
        lines += [f"{self.classes[k]} {scores[k]:.2f}: missed" for k in missed]
        return caption(large, some_of(lines or [_NOTHING]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the names of the attributes that are present, and all scores."""
        scores = [round(score, 4) for score in prediction["scores"].tolist()]
        present = [self.classes[k] for k in prediction["present"].nonzero()[:, 0].tolist()]
        return {"present": present, "scores": dict(zip(self.classes, scores, strict=True))}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image as it is, and the names of the attributes that it has."""
        truth = torch.as_tensor(sample["attributes"])
        present = [classes[k] for k in (truth == 1).nonzero()[:, 0].tolist()]
        unknown = int(truth.isnan().sum())
        text = (", ".join(present) or _NOTHING) + (f"; {unknown} not known" if unknown else "")
        return sample["image"].as_subclass(Tensor), text


class AttributesMetric:
    """Mean average precision ("map") and macro F1 ("f1") over the known entries of the images of all ranks, in 0..1.

    Both are means over the attributes that some image has. The numbers of images may differ between ranks.

    Args:
        threshold: score from which an attribute counts as present, for F1.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []

    def to(self, device: Any) -> AttributesMetric:
        """Return itself: scores are kept on the CPU whatever the device."""
        return self

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples; images without any label are left out."""
        for prediction, sample in zip(predictions, samples, strict=True):
            truth = torch.as_tensor(sample["attributes"])
            if len(truth):
                self.rows.append((prediction["scores"].float().cpu().numpy(), truth.numpy()))

    def compute(self) -> dict[str, float]:
        """Return the metrics, the same on every rank; every rank must call it."""
        gathered = [row for of_rank in gather_objects(self.rows) for row in of_rank]
        if not gathered:
            self._columns: dict[str, Tensor] = {}
            return {"map": 0.0, "f1": 0.0}
        scores, truth = (torch.from_numpy(np.stack(part)) for part in zip(*gathered, strict=True))  # (n, A)
        target = truth.nan_to_num(_UNKNOWN).long()
        present, absent = (target == 1), (target == 0)
        said = scores >= self.threshold
        tp, fp, missed = (said & present).sum(0), (said & absent).sum(0), (~said & present).sum(0)
        some = present.any(0)
        ap = torch.full((len(some),), float("nan"), dtype=torch.float64)
        if some.any():  # the function fails for an attribute that no image has an entry of
            ap[some] = multilabel_average_precision(
                *(scores[:, some], target[:, some], int(some.sum())),
                average="none",
                ignore_index=_UNKNOWN,
                validate_args=False,  # which refuses a single attribute
            ).double()
        self._columns = {
            "ap": ap,
            "f1": ratio(2 * tp, 2 * tp + fp + missed),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + missed),
            "present": present.sum(0),
            "absent": absent.sum(0),
        }
        means = {"map": self._columns["ap"], "f1": torch.where(some, self._columns["f1"], float("nan"))}
        return {name: 0.0 if values.isnan().all() else float(values.nanmean()) for name, values in means.items()}

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every attribute.

        Args:
            classes: A names.
        """
        if not self._columns:
            return {}
        never = [name for name, count in zip(classes, self._columns["present"].tolist(), strict=True) if not count]
        notes = []
        if never:
            notes.append(f"{len(never)} of {len(classes)} attributes are present in no image and left out of the means "
                         f"({', '.join(never[:5])})")  # fmt: skip
        return class_details(classes, self._columns) | ({"notes": notes} if notes else {})
