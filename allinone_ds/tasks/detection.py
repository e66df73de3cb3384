"""Object detection: boxes with classes; heads `fcos` and `rf_detr`; mAP as COCO defines it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.models.fcos import FCOSDetector, FCOSOptions
from allinone_ds.models.rf_detr import RFDetrDetector, RFDetrOptions
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.detection_metric import COCO_LIMIT, SIZES, DetectionMetric, image_score, truth_of
from allinone_ds.tasks.drawing import beside, caption, draw_boxes, enlarge
from allinone_ds.tasks.test_time import TestTime, View, view_size

__all__ = ["DetectionMetric", "DetectionTask"]

_SAME_OBJECT = 0.6
"""IoU above which boxes of one class in different views count as one object."""
_MAX_NAMED_BOXES = 8
"""`draw_truth` writes class names only up to this many boxes."""

_HEADS: dict[str, Any] = {"fcos": (FCOSDetector, FCOSOptions), "rf_detr": (RFDetrDetector, RFDetrOptions)}


class DetectionTask(Task):
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
    shown_score = 0.3
    """Predictions with a lower score are neither drawn nor written to JSON."""

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        detector = _HEADS[str(self.head_name)][0]
        self.detector = detector(
            len(self.classes), self.channels, self.stride, self.num_levels, self.image_size, self.options
        )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"tasks.{self.name}: images of {tuple(pixel_values.shape[-2:])} pixels, but image_size is "
                f"{self.image_size}; resize the images"
            )
        if labels is not None:
            for target in labels:
                if target["boxes"].dtype != torch.float32:
                    raise TypeError(
                        f"tasks.{self.name}: target boxes are {target['boxes'].dtype}, which rounds them to whole "
                        "pixels or more; they must be torch.float32, cast pixel_values only"
                    )
        return self.detector(features, pixel_values, labels)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = []
        for sample in samples:
            boxes = sample["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
            crowd = sample.get("iscrowd")
            keep = torch.ones(len(boxes), dtype=torch.bool) if crowd is None else ~crowd.bool()
            labels.append({"boxes": boxes[keep], "labels": sample["labels"].long()[keep]})
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    def count_labels(self, labels: Any) -> int:
        return self.detector.count_labels(labels)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        return {**sample, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "iscrowd": None}

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
        where = f"tasks.{self.name}.test_time"
        if options.windows:
            raise ConfigError(f"{where}.windows: an object may be cut by a window; for segmentation only")
        queries = self.detector.num_queries if isinstance(self.detector, RFDetrDetector) else 0
        for scale in options.scales:
            H, W = view_size(self.image_size, scale, self.size_multiple)
            if H * W < queries * self.stride**2:
                raise ConfigError(f"{where}.scales: {scale} gives {H * W // self.stride**2} cells for {queries} "
                                  "queries; use a larger scale")  # fmt: skip

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the boxes of all views, without the weaker of two of one class with an IoU above 0.6."""
        views_of_image: list[list[Prediction]] = [[] for _ in sizes]
        for view in views:
            with self.at_size(view.size):
                predictions = self.predict(view.outputs[0], sizes)
            for image, prediction, (_, W) in zip(views_of_image, predictions, sizes, strict=True):
                if view.flipped:
                    x0, y0, x1, y1 = prediction["boxes"].unbind(-1)
                    prediction["boxes"] = torch.stack([W - x1, y0, W - x0, y1], dim=-1)
                image.append(prediction)
        merged = []
        for image in views_of_image:
            together = {key: torch.cat([view[key] for view in image]) for key in ("boxes", "scores", "labels")}
            keep = batched_nms(together["boxes"], together["scores"], together["labels"], _SAME_OBJECT)
            keep = keep[: self.detector.max_detections]  # at most as many as for a single view
            merged.append({key: value[keep] for key, value in together.items()})
        return merged

    @contextlib.contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        before = self.detector.image_size
        with super().at_size(size):
            self.detector.image_size = size
            try:
                yield
            finally:
                self.detector.image_size = before

    def check_threshold(self, threshold: float) -> None:
        super().check_threshold(threshold)
        lowest = self.options.score_threshold
        if threshold < lowest:
            raise ConfigError(
                f"threshold {threshold}: the head of '{self.name}' drops boxes below tasks.{self.name}.options."
                f"score_threshold = {lowest}; give at least {lowest}, or lower the option"
            )

    def metric(self) -> DetectionMetric:
        counted = max(self.options.max_detections or COCO_LIMIT, COCO_LIMIT)
        return DetectionMetric(counted, self.detector.max_detections, self.shown_score)

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, DetectionMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float:
        """Return F1 at IoU 0.5 of the predictions that are drawn."""
        cpu = {key: prediction[key].detach().cpu() for key in ("boxes", "scores", "labels")}
        return image_score(cpu, truth_of(sample), self.shown_score)

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        keep = prediction["scores"] >= self.shown_score
        names = [f"{self.classes[k]} {score:.2f}" for k, score in zip(
            prediction["labels"][keep].tolist(), prediction["scores"][keep].tolist(), strict=True)]  # fmt: skip
        drawn = self._boxes(image, prediction["boxes"][keep], prediction["labels"][keep], names)
        if sample is None:
            return drawn
        truth = self._boxes(image, sample["boxes"], sample["labels"], [self.classes[k] for k in sample["labels"]])
        return beside(caption(drawn, ["predicted"]), caption(truth, ["true"]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the objects, best first: class, score and box (XYXY in pixels of the image)."""
        keep = prediction["scores"] >= self.shown_score
        rows = zip(*(prediction[key][keep].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        return {
            "objects": [
                {"class": self.classes[k], "score": round(score, 4), "box": [round(side, 2) for side in box]}
                for k, score, box in rows
            ]
        }

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with its boxes, and their number."""
        boxes, labels = sample["boxes"].as_subclass(Tensor), sample["labels"]
        names = [classes[k] for k in labels.tolist()] if len(boxes) <= _MAX_NAMED_BOXES else []
        drawn = draw_boxes(sample["image"].as_subclass(Tensor), boxes, labels, names, len(classes))
        return drawn, "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "boxes" (B, A, 4) XYXY in pixels of the network's input and "scores" (B, A, K), before NMS.

        A is the number of candidates: the locations of `fcos`, the queries of `rf_detr`.
        """
        boxes, scores = self.detector.decode(outputs)
        return {"boxes": boxes, "scores": scores}

    def _boxes(self, image: Tensor, boxes: Tensor, labels: Tensor, names: list[str]) -> Tensor:
        large, factor = enlarge(image.cpu())
        return draw_boxes(large, boxes.as_subclass(Tensor) * factor, labels, names, len(self.classes))
