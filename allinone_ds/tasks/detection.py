"""Object detection: boxes with classes; heads `fcos` and `rf_detr`; mAP as COCO defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.models.fcos import FCOSDetector, FCOSOptions
from allinone_ds.models.rf_detr import RFDetrDetector, RFDetrOptions
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.detection_metric import COCO_LIMIT, SIZES, DetectionMetric
from allinone_ds.tasks.drawing import draw_boxes, enlarge
from allinone_ds.tasks.objects.base import ObjectsTask, empty_objects, learned_objects
from allinone_ds.tasks.test_time import TestTime, view_size

__all__ = ["DetectionMetric", "DetectionTask"]

_MAX_NAMED_BOXES = 8
"""`draw_truth` writes class names only up to this many boxes."""

_HEADS: dict[str, Any] = {"fcos": (FCOSDetector, FCOSOptions), "rf_detr": (RFDetrDetector, RFDetrOptions)}


class DetectionTask(ObjectsTask):
    """Predicts boxes of `classes`.

    Labels: for each image {"boxes": (n, 4) float32 XYXY in pixels of the network's input, "labels": (n,) long}. Crowd
    boxes are not targets, and the metric ignores predictions inside them. Loss: sum over the micro-batch, divided by
    its objects (by their positive locations for the head `fcos`).

    Example:
        >>> import torch
        >>> task = DetectionTask("det", ["car"], channels=8, stride=4, num_levels=1, image_size=(16, 16), width=16)
        >>> labels = [{"boxes": torch.tensor([[2.0, 2.0, 10.0, 12.0]]), "labels": torch.tensor([0])}]
        >>> outputs = task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels)
        >>> outputs.loss.shape
        torch.Size([])
        >>> sorted(task.predict(outputs, sizes=[(40, 60)])[0])
        ['boxes', 'labels', 'scores']
    """

    kind = "detection"
    main_metric = "map50"
    greater_is_better = {"map50": True, "map": True, **{f"map_{size}": True for size in SIZES}}
    pipeline_tag = "object-detection"
    HEADS = {name: options for name, (_, options) in _HEADS.items()}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        detector = _HEADS[str(self.head_name)][0]
        self.detector = detector(
            len(self.classes), self.channels, self.stride, self.num_levels, self.image_size, self.options
        )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        self.check_inputs(pixel_values, labels)
        return self.detector(features, pixel_values, labels)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        return {"pixel_values": stack_pixels(samples), "labels": [learned_objects(sample)[0] for sample in samples]}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        return empty_objects(sample)

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image "boxes" (n, 4) XYXY, "scores" (n,) and "labels" (n,), best first."""
        predictions = self.detector.postprocess(outputs)
        for prediction, (H, W) in zip(predictions, sizes, strict=True):
            scale = prediction["boxes"].new_tensor([W / self.image_size[1], H / self.image_size[0]]).repeat(2)
            prediction["boxes"] = prediction["boxes"] * scale
        return predictions

    def check_test_time(self, options: TestTime) -> None:
        """Refuse windows, which cut objects, and for RF-DETR views with fewer cells than queries.

        Raises:
            ConfigError: names the option and what is allowed.
        """
        super().check_test_time(options)
        queries = self.detector.num_queries if isinstance(self.detector, RFDetrDetector) else 0
        for scale in options.scales:
            H, W = view_size(self.image_size, scale, self.size_multiple)
            if H * W < queries * self.stride**2:
                raise ConfigError(
                    f"tasks.{self.name}.test_time.scales: {scale} gives {H * W // self.stride**2} cells for {queries} "
                    "queries; use a larger scale"
                )

    def metric(self) -> DetectionMetric:
        counted = max(self.options.max_detections or COCO_LIMIT, COCO_LIMIT)
        return DetectionMetric(counted, self.detector.max_detections, self.shown_score)

    @staticmethod
    def drawn(image: Tensor, objects: Any, names: Sequence[str], num_classes: int, large: bool = True) -> Tensor:
        """Return the image with boxes in the colours of their classes."""
        image, factor = enlarge(image) if large else (image, 1)
        boxes = objects["boxes"].as_subclass(Tensor) * factor
        return draw_boxes(image, boxes, objects["labels"], list(names), num_classes)

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with its boxes, and their number."""
        count = len(sample["labels"])
        names = [classes[k] for k in sample["labels"].tolist()] if count <= _MAX_NAMED_BOXES else []
        drawn = DetectionTask.drawn(sample["image"].as_subclass(Tensor), sample, names, len(classes), large=False)
        return drawn, "1 box" if count == 1 else f"{count} boxes"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "boxes" (B, A, 4) XYXY in pixels of the network's input and "scores" (B, A, K), before NMS.

        A is the number of candidates: the locations of `fcos`, the queries of `rf_detr`.
        """
        boxes, scores = self.detector.decode(outputs)
        return {"boxes": boxes, "scores": scores}
