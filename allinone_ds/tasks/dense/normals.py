"""Surface normals: a direction per pixel; heads `light` and `dpt`; angles between predicted and true directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from allinone_ds.data.base import Sample
from allinone_ds.data.dense_maps import NormalMap
from allinone_ds.models.dense.decoders import DptDecoderOptions, LightDecoderOptions
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.dense.base import DenseTask, collate_maps, directions, mean_over, without_values
from allinone_ds.tasks.dense.drawing import large, normal_colours
from allinone_ds.tasks.drawing import beside, caption

_LIMITS = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}  # degrees
_BINS = 18000  # of 0.01 degrees


class NormalsTask(DenseTask):
    """Predicts the surface normal of each pixel: x right, y down, z towards the viewer.

    Labels: (B, 3, H, W) float32 of length 1, NaN without a value. Loss: mean over the valid pixels of 1 - cosine of the
    angle between predicted and true normal. All pixels start towards the viewer.

    Example:
        >>> import torch
        >>> task = NormalsTask("normals", [], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> labels = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape, task.predict(outputs, sizes=[(20, 30)])[0]["normals"].shape
        (torch.Size([]), torch.Size([3, 20, 30]))
    """

    kind = "normals"
    main_metric = "within_22"
    greater_is_better = directions(list(_LIMITS), ["mean_angle", "median_angle"])
    HEADS = {"light": LightDecoderOptions, "dpt": DptDecoderOptions}
    per_pixel = 3

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.decoder.start_with(0.0, 0.0, 1.0)

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        valid = labels.isfinite().all(1)  # (B, H, W)
        true = torch.where(valid[:, None], labels, 0.0)
        cosine = (_unit(maps) * true).sum(1)
        return mean_over(((1 - cosine) * valid).sum(), valid)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return collate_maps(samples, "normals", NormalMap)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return a view of the image without any normal."""
        return without_values(sample, "normals", NormalMap(torch.full((3, 1, 1), math.nan)))

    def count_labels(self, labels: Tensor) -> int:
        """Return the number of valid pixels."""
        return int(torch.count_nonzero(labels.isfinite().all(1)))

    def values(self, maps: Tensor) -> Tensor:
        """Return vectors of length 1."""
        return _unit(maps.float())

    def prediction(self, values: Tensor) -> Prediction:
        return {"normals": _unit(values[None])[0]}

    def unflipped(self, values: Tensor) -> Tensor:
        """Return the normals of a mirrored image as they are in the image: x changes its sign."""
        return values.flip(-1) * values.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)

    def metric(self) -> NormalsMetric:
        return NormalsMetric()

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the fraction of the image's pixels within 22.5 degrees; None without a valid pixel."""
        metric = NormalsMetric()
        metric.update([prediction], [sample])
        return metric.values()["within_22"] if metric.pixels else None

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        def drawn(normals: Tensor, title: str) -> Tensor:
            return caption(large(normal_colours(normals)), [title])

        pictures = beside(caption(large(image), ["image"]), drawn(prediction["normals"], "predicted normals"))
        return pictures if sample is None else beside(pictures, drawn(sample["normals"], "true normals"))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the mean normal [x, y, z]; the map itself is written as a picture."""
        return {"mean": [round(value, 4) for value in prediction["normals"].float().mean((1, 2)).tolist()]}

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the normals in their usual colours."""
        return normal_colours(sample["normals"].as_subclass(Tensor)), "red: right, green: up, blue: to the viewer"

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, 3, *self.image_size)

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "normals" (B, 3, h, w) of length 1."""
        return {"normals": self.values(outputs.maps)}


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors (B, 3, H, W) with the length 1."""
    return F.normalize(vectors, dim=1, eps=1e-6)


class NormalsMetric(Metric):
    """Angles between predicted and true normals in degrees, pooled over the valid pixels of all images of all ranks.

    mean_angle; median_angle, the middle of a bin of 0.01 degrees; within_11, within_22, within_30: fraction of the
    pixels with an angle below 11.25, 22.5 and 30 degrees.
    """

    total: Tensor
    within: Tensor
    bins: Tensor
    pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(_LIMITS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("bins", torch.zeros(_BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            true = sample["normals"].as_subclass(Tensor).to(self.device)
            valid = true.isfinite().all(0)
            found = F.normalize(prediction["normals"].to(self.device)[:, valid].double(), dim=0)  # (3, n)
            true = F.normalize(true[:, valid].double(), dim=0)
            # more exact for small angles than the arc cosine
            angle = torch.rad2deg(2 * torch.atan2((found - true).norm(dim=0), (found + true).norm(dim=0)))
            self.total += angle.sum()
            self.within += torch.stack([(angle < limit).sum() for limit in _LIMITS.values()])
            places = (angle * (_BINS / 180)).long().clamp(max=_BINS - 1)
            self.bins += torch.bincount(places, minlength=_BINS)
            self.pixels += valid.sum()

    def compute(self) -> dict[str, float]:
        """Return the values by name, the same on every rank; without a valid pixel, NaN and fractions of 0."""
        return self.values()

    def values(self) -> dict[str, float]:
        """Return the values of this rank's images, or of all ranks inside `compute`."""
        pixels = int(self.pixels)
        fractions = {name: int(count) / max(pixels, 1) for name, count in zip(_LIMITS, self.within, strict=True)}
        if not pixels:
            return {**fractions, "mean_angle": math.nan, "median_angle": math.nan}
        place = int(torch.searchsorted(self.bins.cumsum(0), (pixels + 1) // 2))
        return {
            **fractions,
            "mean_angle": float(self.total) / pixels,
            "median_angle": (place + 0.5) * 180 / _BINS,
        }
