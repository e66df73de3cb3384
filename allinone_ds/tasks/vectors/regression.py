"""Regression: one or several numbers per image; head `numbers`; R2, RMSE and MAE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.distributed import gather_objects
from allinone_ds.tasks.base import Prediction, full_precision
from allinone_ds.tasks.details import Details, class_details
from allinone_ds.tasks.drawing import caption, enlarge
from allinone_ds.tasks.vectors.pooling import EntriesTask, PooledOptions, known_entries, some_of, stack_entries

_COUNTED = 20_000
"""Training images whose numbers are read at the start, for mean and standard deviation."""
_NAMED = 8
"""Columns that the log names."""
_DIGITS = 53  # bits of the fraction of a float64
_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class NumbersOptions(PooledOptions):
    """Options of the regression head `numbers`.

    Example:
        >>> NumbersOptions(loss="l1").dropout
        0.0
    """

    loss: Literal["mse", "l1", "smooth_l1"] = "mse"
    """Loss of a number in units of its standard deviation in the training data."""


@dataclass
class RegressionOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean loss over the known numbers of the micro-batch, float32.
        normalized: (B, C) in units of the standard deviation, from the mean on.
    """

    loss: Tensor | None = None
    normalized: Tensor | None = None


class RegressionTask(EntriesTask):
    """Predicts the numbers that `classes` names.

    Targets are normalised with mean and standard deviation of the training data, which the weights of the task contain.

    Labels: (B, C) float64, NaN where there is no value. Loss: mean over the known numbers of the micro-batch.

    Example:
        >>> import torch
        >>> task = RegressionTask("age", ["years"], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> task.use_samples([{"value": torch.tensor([20.0])}, {"value": torch.tensor([40.0])}])
        'mean and standard deviation of 2 training images: years 30 and 10'
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), torch.tensor([[25.0]]))
        >>> outputs.loss.shape, list(task.predict(outputs, sizes=[(20, 30)])[0])
        (torch.Size([]), ['value'])
    """

    kind = "regression"
    main_metric = "r2"
    greater_is_better = {"r2": True, "rmse": False, "mae": False}
    HEADS = {"numbers": NumbersOptions}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        # Mean and deviation, each as integer * 2 ** integer: a model in bfloat16 would round floats to 3 digits.
        self.register_buffer("statistics", torch.zeros(2, 2, len(self.classes), dtype=torch.long))

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each number in the training data, float64 (C,); 0 and 1 if not known."""
        stored: Any = self.statistics
        mean, deviation = (stored[:, 0].double() * torch.exp2(stored[:, 1].double())).unbind(0)
        return mean, torch.where(deviation > 0, deviation, 1.0)

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        normalized = self.output(self.pooling(features))
        out = RegressionOutput(normalized=normalized)
        if labels is not None:
            with full_precision(pixel_values.device):
                predicted = normalized.float()
                target, known = known_entries(labels, predicted)
                mean, deviation = self.moments
                target = ((target - mean) / deviation).float()
                each = _LOSSES[self.options.loss](predicted, target, reduction="none")
                out.loss = (each * known).sum() / known.sum().clamp(min=1)
        return out

    def samples_to_count(self) -> int:
        return 0 if bool(self.statistics.any()) else _COUNTED  # type: ignore[operator]  # a buffer

    @torch.no_grad()
    def use_samples(self, samples: Iterable[Sample]) -> str | None:
        """Set mean and standard deviation of the numbers."""
        rows = [torch.as_tensor(sample["value"], dtype=torch.float64).reshape(-1) for sample in samples]
        rows = [row for row in rows if len(row) == len(self.classes)]
        if not rows:
            return None
        values = torch.stack(rows)  # (n, C)
        known = ~values.isnan()
        count = known.sum(0).clamp(min=1)
        mean = values.nan_to_num(0.0).sum(0) / count
        deviation = ((torch.where(known, values, mean) - mean).square().sum(0) / count).sqrt()
        fraction, exponent = torch.frexp(torch.stack([mean, deviation]))
        parts = [(fraction * 2**_DIGITS).long(), exponent.long() - _DIGITS]
        self.statistics.copy_(torch.stack(parts, dim=1))  # type: ignore[operator]
        named = [f"{name} {m:.6g} and {d:.6g}" for name, m, d in zip(self.classes, mean, deviation, strict=True)]
        more = ", ..." if len(named) > _NAMED else ""
        return f"mean and standard deviation of {len(rows)} training images: {', '.join(named[:_NAMED])}{more}"

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(samples), "labels": stack_entries(samples, "value")}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without any number."""
        return {**sample, "value": torch.zeros(0)}

    def values(self, outputs: Any) -> Tensor:
        """Return numbers in the units of the training data, float64."""
        mean, deviation = self.moments
        return mean + deviation * outputs.normalized.double()

    def prediction(self, values: Tensor) -> Prediction:
        """Return the "value" (C,) of an image."""
        return {"value": values}

    def metric(self) -> RegressionMetric:
        return RegressionMetric()

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, RegressionMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return 1 / (1 + e) of the root mean square error e, in standard deviations of the training data."""
        truth = torch.as_tensor(sample["value"], dtype=torch.float64).reshape(-1)
        known = ~truth.isnan()
        if not known.any():
            return None
        deviation = self.moments[1].cpu()
        error = ((prediction["value"].double().cpu() - truth) / deviation)[known].square().mean().sqrt()
        return 1 / (1 + float(error))

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        large, _ = enlarge(image.cpu())
        truth = torch.as_tensor([] if sample is None else sample["value"]).reshape(-1).tolist()
        lines = []
        for place, (name, value) in enumerate(zip(self.classes, prediction["value"].tolist(), strict=True)):
            known = place < len(truth) and not math.isnan(truth[place])
            lines.append(f"{name} {value:.4g}" + (f", true: {truth[place]:.4g}" if known else ""))
        return caption(large, some_of(lines))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the numbers by name."""
        return dict(zip(self.classes, prediction["value"].tolist(), strict=True))

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image as it is, and its numbers."""
        values = zip(classes, torch.as_tensor(sample["value"]).reshape(-1).tolist(), strict=False)
        return sample["image"].as_subclass(Tensor), ", ".join(f"{name} {value:.4g}" for name, value in values)

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "value" (B, C) in the units of the training data."""
        mean, deviation = self.moments
        return {"value": mean.float() + deviation.float() * outputs.normalized.float()}


class RegressionMetric:
    """R2 ("r2", at most 1, 0 for the mean of the truth), RMSE and MAE over the images of all ranks, float64.

    R2 is the mean over the columns whose truth is not constant; RMSE and MAE, in the units of the data, are means over
    all columns, each over its known numbers. The numbers of images may differ between ranks.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[tuple[list[float], list[float]]] = []

    def to(self, device: Any) -> RegressionMetric:
        """Return itself: numbers are kept on the CPU whatever the device."""
        return self

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples; images without any value are left out."""
        for prediction, sample in zip(predictions, samples, strict=True):
            truth = torch.as_tensor(sample["value"], dtype=torch.float64).reshape(-1).tolist()
            if truth:
                self.rows.append((prediction["value"].tolist(), truth))

    def compute(self) -> dict[str, float]:
        """Return the metrics, the same on every rank; every rank must call it."""
        gathered = [row for of_rank in gather_objects(self.rows) for row in of_rank]
        self._columns: dict[str, Tensor] = {}
        if not gathered:
            return {"r2": 0.0, "rmse": 0.0, "mae": 0.0}
        predicted, truth = (torch.tensor(part, dtype=torch.float64) for part in zip(*gathered, strict=True))  # (n, C)
        known = ~truth.isnan()
        count = known.sum(0)
        error = torch.where(known, predicted - truth, 0.0)
        mean = torch.where(known, truth, 0.0).sum(0) / count.clamp(min=1)
        spread = (torch.where(known, truth, mean) - mean).square().sum(0)
        squares = error.square().sum(0)
        nothing = torch.tensor(float("nan"), dtype=torch.float64)
        self._columns = {
            "r2": torch.where(spread > 0, 1 - squares / spread, nothing),
            "rmse": torch.where(count > 0, (squares / count).sqrt(), nothing),
            "mae": torch.where(count > 0, error.abs().sum(0) / count, nothing),
            "mean": torch.where(count > 0, mean, nothing),
            "std": torch.where(count > 0, (spread / count).sqrt(), nothing),
            "images": count,
        }
        means = {name: self._columns[name].nanmean() for name in ("r2", "rmse", "mae")}
        return {name: 0.0 if value.isnan() else float(value) for name, value in means.items()}

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every column.

        Args:
            classes: C names.
        """
        if not self._columns:
            return {}
        constant = [n for n, value in zip(classes, self._columns["r2"].tolist(), strict=True) if math.isnan(value)]
        notes = []
        if constant:
            notes.append(
                f"{len(constant)} of {len(classes)} columns have fewer than two different true values, so R2 leaves "
                f"them out ({', '.join(constant[:5])})"
            )
        return class_details(classes, self._columns) | ({"notes": notes} if notes else {})
