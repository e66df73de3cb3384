"""COCO's average precision of masks and keypoints over all ranks, by `pycocotools`."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from allinone_ds.data.base import Sample
from allinone_ds.distributed import gather_objects
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.details import Details, class_details

IMAGE_LIMIT = 100
"""Predictions per image and class that count, the best ones."""


class CocoMetric:
    """COCO's mAP ("map", mean over thresholds 0.50 to 0.95) and mAP50 ("map50") over the images of all ranks, in 0..1.

    The numbers of images may differ between ranks: all are gathered, and every rank computes the same result.

    Args:
        sigmas: tolerance of each keypoint, for the similarity of keypoints (OKS); None: the IoU of masks.
        max_detections: predictions per image and class that count.
        shown_score: `details` counts predictions with at least this score.
    """

    def __init__(
        self, sigmas: Sequence[float] | None = None, max_detections: int = IMAGE_LIMIT, shown_score: float = 0.3
    ) -> None:
        self.sigmas, self.max_detections, self.shown_score = sigmas, max_detections, shown_score
        self.reset()

    def reset(self) -> None:
        self.images: list[tuple[tuple[int, int], list[dict[str, Any]], list[dict[str, Any]]]] = []
        self._all = self.images
        self._precision: np.ndarray | None = None  # (threshold, recall, class, area, limit); -1: no object
        self._classes: list[int] = []

    def to(self, device: Any) -> CocoMetric:
        """Return itself: predictions are kept on the CPU whatever the device."""
        return self

    def update(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            H, W = sample["image"].shape[-2:]
            self.images.append(((H, W), self._found(prediction), self._truth(sample)))

    def _found(self, prediction: Prediction) -> list[dict[str, Any]]:
        """Return the predictions of an image as COCO's annotations."""
        found = [
            {"category_id": label, "score": score}
            for label, score in zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)
        ]
        if self.sigmas is None:
            for annotation, code in zip(found, encode(prediction["masks"]), strict=True):
                annotation |= {"segmentation": code, "area": float(rle.area(code))}
            return found
        for annotation, points in zip(found, prediction["keypoints"].double().cpu().numpy(), strict=True):
            low, high = points.min(0), points.max(0)
            flat = np.concatenate([points, np.ones((len(points), 1))], axis=1).ravel().tolist()
            annotation |= {"keypoints": flat, "area": float((high - low).prod())}
            annotation["bbox"] = [*low.tolist(), *(high - low).tolist()]
        return found

    def _truth(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the objects of an image as COCO's annotations."""
        boxes = sample["boxes"].as_subclass(Tensor).double().reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        crowd = sample["iscrowd"].tolist() if "iscrowd" in sample else [0] * len(boxes)
        truth = [{"category_id": k, "iscrowd": int(c)} for k, c in zip(sample["labels"].tolist(), crowd, strict=True)]
        if self.sigmas is None:
            for annotation, code in zip(truth, encode(sample["masks"].as_subclass(Tensor)), strict=True):
                annotation |= {"segmentation": code, "area": float(rle.area(code))}
            return truth
        areas = sample["area"].tolist() if "area" in sample else sides.prod(-1).tolist()
        points = sample["keypoints"].as_subclass(Tensor).double()  # (n, P, 2)
        visible = sample["visible"]
        for i, annotation in enumerate(truth):
            flat = torch.cat([points[i], visible[i][:, None].double()], dim=1).flatten().tolist()
            annotation |= {"keypoints": flat, "num_keypoints": int((visible[i] > 0).sum()), "area": areas[i]}
            annotation["bbox"] = [*boxes[i, :2].tolist(), *sides[i].tolist()]
        return truth

    def compute(self) -> dict[str, float]:
        """Return the metrics, the same on every rank; every rank must call it."""
        self._all = [image for of_rank in gather_objects(self.images) for image in of_rank]
        self._classes = sorted({a["category_id"] for _, _, truth in self._all for a in truth})
        self._precision = None
        if not self._classes:
            return {"map50": 0.0, "map": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation = COCOeval(self._dataset(2), self._dataset(1), "segm" if self.sigmas is None else "keypoints")
            evaluation.params.maxDets = [self.max_detections]
            if self.sigmas is not None:
                evaluation.params.kpt_oks_sigmas = np.asarray(self.sigmas, dtype=np.float64)
            evaluation.evaluate()
            evaluation.accumulate()
        self._areas = [str(name) for name in evaluation.params.areaRngLbl]
        self._precision = evaluation.eval["precision"]
        found = {"map50": _mean(self._precision[0, :, :, 0]), "map": _mean(self._precision[:, :, :, 0])}
        return {name: 0.0 if math.isnan(value) else value for name, value in found.items()}

    def _dataset(self, place: int) -> COCO:
        """Return the predictions (1) or the truth (2) of all images as pycocotools' own class."""
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(self._all):
            for annotation in image[place]:  # type: ignore[union-attr]
                annotations.append({"iscrowd": 0, **annotation, "image_id": number, "id": len(annotations) + 1})  # type: ignore[dict-item]
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n, "height": size[0], "width": size[1]} for n, (size, _, _) in enumerate(self._all)],
            "annotations": annotations,
            "categories": [{"id": label} for label in self._classes],
        }
        coco.createIndex()
        return coco

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every class, and the mAP for each size that the truth contains.

        Args:
            classes: K class names.
        """
        K = len(classes)
        names = ("ap50", "ap", *(f"ap {area}" for area in self._areas[1:])) if self._precision is not None else ()
        columns = {name: torch.full((K,), float("nan"), dtype=torch.float64) for name in names}
        metrics = {}
        if self._precision is not None:
            for place, label in enumerate(self._classes):
                of_class = self._precision[:, :, place]
                columns["ap50"][label] = _mean(of_class[0, :, 0])
                columns["ap"][label] = _mean(of_class[:, :, 0])
                for i, area in enumerate(self._areas[1:], 1):
                    columns[f"ap {area}"][label] = _mean(of_class[:, :, i])
            by_area = {f"map_{a}": _mean(self._precision[:, :, :, i]) for i, a in enumerate(self._areas) if i}
            metrics = {name: value for name, value in by_area.items() if not math.isnan(value)}
        counts = {"objects": torch.zeros(K, dtype=torch.long), "predicted": torch.zeros(K, dtype=torch.long)}
        for _, found, truth in self._all:
            for annotation in truth:
                counts["objects"][annotation["category_id"]] += not annotation["iscrowd"]
            for annotation in found:
                counts["predicted"][annotation["category_id"]] += annotation["score"] >= self.shown_score
        return class_details(classes, columns | counts) | {"metrics": metrics}


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks (n, H, W) as COCO's run lengths."""
    return [rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks]


def _mean(precision: np.ndarray) -> float:
    """Return the mean of the values above -1, which stands for no object; NaN if there are none."""
    known = precision[precision > -1]
    return float(known.mean()) if len(known) else math.nan
