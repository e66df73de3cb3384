"""What the kinds of task that find objects share: targets, views, thresholds, drawings and JSON."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import batched_nms

from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.models.fcos import FCOSDetector
from allinone_ds.models.objects.regions import RegionDetector
from allinone_ds.models.rf_detr import RFDetrDetector
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.detection_metric import DetectionMetric, image_score, truth_of
from allinone_ds.tasks.drawing import beside, caption
from allinone_ds.tasks.objects.coco_metric import CocoMetric
from allinone_ds.tasks.test_time import TestTime, View, refuse_windows

_SAME_OBJECT = 0.6
"""IoU above which boxes of one class in different views count as one object."""


class ObjectsTask(Task):
    """Base class of the kinds that find objects, each with a box, a class and a score.

    A subclass sets `detector` and implements `drawn`. If its predictions have more keys than "boxes" (n, 4), "scores"
    (n,) and "labels" (n,), it extends `mirrored` and `described`.

    Attributes:
        detector: the head, with `max_detections` and `count_labels`.
    """

    detector: Any
    shown_score = 0.3
    """Predictions with a lower score are neither drawn nor written to JSON."""

    @staticmethod
    @abstractmethod
    def drawn(image: Tensor, objects: Any, names: Sequence[str], num_classes: int, large: bool = True) -> Tensor:
        """Return the image, enlarged if `large`, with objects on it.

        Args:
            image: uint8 (3, H, W).
            objects: a prediction, or a sample with the targets of this kind.
            names: one text per object, or none.
            num_classes: K, for the colours.
            large: whether small images are enlarged.
        """

    def check_inputs(self, pixel_values: Tensor, labels: Any) -> None:
        """Check that images have the size that boxes are learned at, and that no box was rounded.

        Args:
            pixel_values: (B, 3, H, W).
            labels: for each image {"boxes": (n, 4), ...}, or None.

        Raises:
            ValueError: the images have another size than `image_size`.
            TypeError: boxes are not float32.
        """
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"tasks.{self.name}: images of {tuple(pixel_values.shape[-2:])} pixels, but image_size is "
                f"{self.image_size}; resize the images"
            )
        for target in labels or ():
            if target["boxes"].dtype != torch.float32:
                raise TypeError(
                    f"tasks.{self.name}: target boxes are {target['boxes'].dtype}, which rounds them to whole pixels "
                    "or more; they must be torch.float32, cast pixel_values only"
                )

    def count_labels(self, labels: Any) -> int:
        """Return the number that the head divides its loss by: objects, or the positive locations of FCOS."""
        return self.detector.count_labels(labels)

    def check_test_time(self, options: TestTime) -> None:
        refuse_windows(self.name, self.kind, options)

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the objects of all views, without the weaker of two of one class whose boxes have an IoU above 0.6."""
        of_image: list[list[Prediction]] = [[] for _ in sizes]
        for view in views:
            with self.at_size(view.size):
                predictions = self.predict(view.outputs[0], sizes)
            for image, prediction, (_, W) in zip(of_image, predictions, sizes, strict=True):
                image.append(self.mirrored(prediction, W) if view.flipped else prediction)
        return [self.merged({key: torch.cat([view[key] for view in image]) for key in image[0]}) for image in of_image]

    def mirrored(self, prediction: Prediction, width: int) -> Prediction:
        """Return the prediction of a mirrored image as it is in the image of this width in pixels."""
        x0, y0, x1, y1 = prediction["boxes"].unbind(-1)
        return {**prediction, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=-1)}

    def merged(self, together: Prediction) -> Prediction:
        """Return the objects of an image from those of all its views, at most as many as for a single view."""
        keep = batched_nms(together["boxes"], together["scores"], together["labels"], _SAME_OBJECT)
        keep = keep[: self.detector.max_detections]
        return {key: value[keep] for key, value in together.items()}

    @contextlib.contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        before = self.image_size
        with super().at_size(size):
            self._resize(size)
            try:
                yield
            finally:
                self._resize(before)

    def _resize(self, size: tuple[int, int]) -> None:
        for part in self.detector.modules():
            if isinstance(part, FCOSDetector | RFDetrDetector | RegionDetector):
                part.image_size = size

    def lowest_score(self) -> float:
        """Return the score below which the head drops objects."""
        return self.options.score_threshold

    def check_threshold(self, threshold: float) -> None:
        super().check_threshold(threshold)
        lowest = self.lowest_score()
        if threshold < lowest:
            raise ConfigError(
                f"threshold {threshold}: the head of '{self.name}' drops boxes below tasks.{self.name}.options."
                f"score_threshold = {lowest}; give at least {lowest}, or lower the option"
            )

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, DetectionMetric | CocoMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return F1 at IoU 0.5 of the boxes that are drawn."""
        cpu = {key: prediction[key].detach().cpu() for key in ("boxes", "scores", "labels")}
        return image_score(cpu, truth_of(sample), float(self.shown_score))

    def _shown(self, prediction: Prediction) -> Prediction:
        keep = prediction["scores"] >= self.shown_score
        return {key: value[keep].cpu() for key, value in prediction.items()}

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        shown = self._shown(prediction)
        pairs = zip(shown["labels"].tolist(), shown["scores"].tolist(), strict=True)
        names = [f"{self.classes[k]} {score:.2f}" for k, score in pairs]
        drawn = self.drawn(image.cpu(), shown, names, len(self.classes))
        if sample is None:
            return drawn
        names = [self.classes[k] for k in sample["labels"].tolist()]
        truth = self.drawn(image.cpu(), sample, names, len(self.classes))
        return beside(caption(drawn, ["predicted"]), caption(truth, ["true"]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the objects, best first: class, score, box (XYXY in pixels of the image), and what the kind adds."""
        shown = self._shown(prediction)
        rows = zip(*(shown[key].tolist() for key in ("labels", "scores", "boxes")), self.described(shown), strict=True)
        return {
            "objects": [
                {"class": self.classes[k], "score": round(score, 4), "box": [round(side, 2) for side in box], **more}
                for k, score, box, more in rows
            ]
        }

    def described(self, shown: Prediction) -> list[dict[str, Any]]:
        """Return what `to_json` adds to each object of a prediction."""
        return [{} for _ in shown["labels"]]


def learned_objects(sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Return "boxes" (m, 4) float32 and "labels" (m,) of the objects that are no crowds, and which they are, bool (n,).

    Args:
        sample: a transformed sample.
    """
    boxes = sample["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
    crowd = sample.get("iscrowd")
    keep = torch.ones(len(boxes), dtype=torch.bool) if crowd is None else ~crowd.bool()
    return {"boxes": boxes[keep], "labels": sample["labels"].long()[keep]}, keep


def empty_objects(sample: Sample) -> Sample:
    """Return a sample with its image and without any object."""
    size = sample["image"].shape[-2:]
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(size))  # type: ignore[call-overload]
    nothing = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.long), "iscrowd": torch.zeros(0, dtype=torch.bool)}
    return {**sample, **nothing}
