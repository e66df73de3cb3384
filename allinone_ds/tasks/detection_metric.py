"""COCO's mAP over all ranks, with AP by class and by size, confusions, and a warning where its limit hides objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from allinone_ds.data.base import Sample
from allinone_ds.distributed import broadcast_object, gather_objects, rank
from allinone_ds.tasks.details import MAX_COUNTED, Details, class_details

COCO_LIMIT = 100
"""Predictions per image and class that COCO's mAP counts, the best ones."""
SIZES = ("small", "medium", "large")
"""COCO's sizes: box areas below 32^2, up to 96^2, and above, in pixels of the original image."""
MATCH_IOU = 0.5
"""IoU from which a prediction and an object are a pair, in confusions and in the scores of images."""

# COCO's thresholds in float64. Those of torchmetrics 1.9 are rounded to float32, some of them above the recall they
# stand for, which changed the mAP of random boxes by 4e-4 relative to pycocotools.
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALLS = np.linspace(0.0, 1.0, 101).tolist()


class DetectionMetric:
    """COCO's mAP ("map", mean over IoU 0.50 to 0.95) and mAP50 ("map50") over the images of all ranks.

    torchmetrics gathers one tensor per image and needs equally many images on every rank. Here the numbers may differ:
    the lists are gathered as objects, and every rank computes the same result from all of them.

    Args:
        max_detections: predictions per image and class that count, the best ones.
        kept: boxes per image that the head keeps; None: no limit.
        shown_score: confusions count predictions with at least this score.
    """

    def __init__(self, max_detections: int = COCO_LIMIT, kept: int | None = None, shown_score: float = 0.3) -> None:
        self.max_detections, self.kept, self.shown_score = max_detections, kept, shown_score
        self.reset()

    def reset(self) -> None:
        self.images: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._all: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # of every rank, after `compute`
        self._precision: Tensor | None = None  # (IoU, recall, class, size, limit); -1 where there is no object
        self._classes: list[int] = []  # labels of the third axis

    def to(self, device: Any) -> DetectionMetric:
        """Return itself: boxes are kept on the CPU whatever the device."""
        return self

    def update(self, predictions: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> None:
        """Add images: their predictions and the original samples."""
        for prediction, sample in zip(predictions, samples, strict=True):
            predicted = {key: prediction[key].detach().cpu() for key in ("boxes", "scores", "labels")}
            self.images.append((predicted, truth_of(sample)))

    def compute(self) -> dict[str, float]:
        """Return the metrics, the same on every rank; every rank must call it. Rank 0 computes them."""
        self._all = [image for of_rank in gather_objects(self.images) for image in of_rank]
        self._precision, self._classes = None, []
        if not self._all:
            return {"map50": 0.0, "map": 0.0}
        self._precision, self._classes = broadcast_object(self._measured() if rank() == 0 else None)
        assert self._precision is not None
        found = {"map50": _mean(self._precision[0, :, :, 0]), "map": _mean(self._precision[:, :, :, 0])}
        return {key: 0.0 if math.isnan(value) else value for key, value in found.items()}  # NaN: no object in the truth

    def _measured(self) -> tuple[Tensor, list[int]]:
        """Return the precisions over all images, and the labels of their third axis."""
        metric = MeanAveragePrecision(
            box_format="xyxy",
            iou_type="bbox",
            iou_thresholds=_IOU_THRESHOLDS,
            rec_thresholds=_RECALLS,
            max_detection_thresholds=[1, 10, max(self.max_detections, 11)],
            extended_summary=True,
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False  # `details` warns, with numbers
        metric.update([predicted for predicted, _ in self._all], [truth for _, truth in self._all])
        result = metric.compute()
        # The summary of pycocotools has no "map" unless 100 is among the limits, so the means are computed here.
        return torch.as_tensor(result["precision"])[..., -1:].clone(), result["classes"].reshape(-1).tolist()

    def details(self, classes: Sequence[str]) -> Details:
        """Return what `compute` found for every class, and the mAP for each size that the truth contains.

        "predicted" counts predictions with at least `shown_score`.

        Args:
            classes: K class names.
        """
        K = len(classes)
        columns = {name: torch.full((K,), float("nan")) for name in ("ap50", "ap", *(f"ap {size}" for size in SIZES))}
        for place, label in enumerate(self._classes):
            assert self._precision is not None
            of_class = self._precision[:, :, place]
            columns["ap50"][label] = _mean(of_class[0, :, 0])
            columns["ap"][label] = _mean(of_class[:, :, 0])
            for i, size in enumerate(SIZES, 1):
                columns[f"ap {size}"][label] = _mean(of_class[:, :, i])
        objects, predicted = torch.zeros(K, dtype=torch.long), torch.zeros(K, dtype=torch.long)
        confusion = torch.zeros(K + 1, K + 1, dtype=torch.long) if K <= MAX_COUNTED else None
        for prediction, truth in self._all:
            labels = truth["labels"][~crowds(truth)]
            objects += torch.bincount(labels, minlength=K)
            predicted += torch.bincount(prediction["labels"][prediction["scores"] >= self.shown_score], minlength=K)
            if confusion is not None:
                rows, cols = confusions(prediction, truth, self.shown_score, K)
                confusion.index_put_((rows, cols), torch.ones_like(rows), accumulate=True)
        columns |= {"objects": objects, "predicted": predicted}
        details = class_details(classes, columns, confusion, [*classes, "nothing"])
        by_size = {f"map_{size}": self._of_size(i) for i, size in enumerate(SIZES, 1)}
        metrics = {name: value for name, value in by_size.items() if not math.isnan(value)}
        return details | {"metrics": metrics, "notes": self._hidden_objects(K)}

    def _of_size(self, place: int) -> float:
        return math.nan if self._precision is None else _mean(self._precision[:, :, :, place])

    def _hidden_objects(self, num_classes: int) -> list[str]:
        """Return a warning if images have more objects than the metric counts or than the head can find."""
        truths = [truth["labels"][~crowds(truth)] for _, truth in self._all]
        of_class = [int(torch.bincount(labels, minlength=num_classes).max()) if len(labels) else 0 for labels in truths]
        notes = []
        hidden = [count for count in of_class if count > self.max_detections]
        if hidden:
            notes.append(
                f"{len(hidden)} of {len(truths)} images have more than {self.max_detections} objects of one class "
                f"(up to {max(hidden)}), of which mAP counts {self.max_detections}: even perfect predictions score "
                f"less than 1; set options.max_detections to {max(hidden)} or more"
            )
        hidden = [len(labels) for labels in truths if self.kept is not None and len(labels) > self.kept]
        if hidden:
            notes.append(
                f"{len(hidden)} of {len(truths)} images have more objects (up to {max(hidden)}) than the {self.kept} "
                "boxes that the head keeps per image; raise options.max_detections, and num_queries where the head "
                "has it"
            )
        return notes


def truth_of(sample: Sample) -> dict[str, Tensor]:
    """Return boxes (n, 4) float32, labels (n,) and, if the sample has it, iscrowd (n,) long."""
    truth = {"boxes": sample["boxes"].as_subclass(Tensor).float().reshape(-1, 4), "labels": sample["labels"]}
    if "iscrowd" in sample:
        truth["iscrowd"] = sample["iscrowd"].long()
    return truth


def crowds(truth: dict[str, Tensor]) -> Tensor:
    """Return which boxes are crowds, bool (n,)."""
    return truth["iscrowd"].bool() if "iscrowd" in truth else torch.zeros(len(truth["labels"]), dtype=torch.bool)


def pairs(prediction: dict[str, Tensor], truth: dict[str, Tensor], score: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pair predictions and objects that overlap: those of one class first, then by falling IoU.

    Args:
        prediction: boxes, scores, labels.
        truth: what `truth_of` returned. Predictions inside a crowd are left out, unless they have an object.
        score: predictions with a lower score are left out.

    Returns:
        Labels of the predictions (p,); labels of the objects (n,); and pairs (m, 2) of their positions.
    """
    keep = prediction["scores"] >= score
    boxes, labels = prediction["boxes"][keep], prediction["labels"][keep]
    crowd = crowds(truth)
    objects = truth["labels"][~crowd]
    iou = box_iou(boxes, truth["boxes"][~crowd])  # (p, n)
    rank = iou + (labels[:, None] == objects)  # an IoU is at most 1
    paired = []
    free_rows, free_cols = set(range(len(labels))), set(range(len(objects)))
    order = torch.where(iou >= MATCH_IOU, rank, -1.0).flatten().argsort(descending=True, stable=True)
    for place in order[: int((iou >= MATCH_IOU).sum())].tolist():
        row, col = divmod(place, len(objects))
        if row in free_rows and col in free_cols:
            paired.append((row, col))
            free_rows.remove(row)
            free_cols.remove(col)
    if crowd.any() and free_rows:
        rows = sorted(free_rows)
        sides = (boxes[rows][:, 2:] - boxes[rows][:, :2]).clamp(min=0)
        shared = _intersections(boxes[rows], truth["boxes"][crowd]) / sides.prod(-1, keepdim=True).clamp(min=1e-9)
        same = labels[rows][:, None] == truth["labels"][crowd]
        inside = ((shared >= MATCH_IOU) & same).any(1)
        kept = [row for row in range(len(labels)) if row not in {r for r, i in zip(rows, inside, strict=True) if i}]
        place_of = {row: place for place, row in enumerate(kept)}
        labels, paired = labels[kept], [(place_of[row], col) for row, col in paired]
    return labels, objects, torch.tensor(paired, dtype=torch.long).reshape(-1, 2)


def confusions(
    prediction: dict[str, Tensor], truth: dict[str, Tensor], score: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return true and predicted labels of every pair, of every missed object and of every prediction without an object.

    `num_classes` stands for nothing: the predicted label of a missed object, and the true one of a false prediction.
    """
    predicted, objects, paired = pairs(prediction, truth, score)
    rows, cols = paired.unbind(-1)
    missed = torch.ones(len(objects), dtype=torch.bool).index_fill_(0, cols, False)
    false = torch.ones(len(predicted), dtype=torch.bool).index_fill_(0, rows, False)
    nothing = torch.tensor([num_classes])
    true = torch.cat([objects[cols], objects[missed], nothing.expand(int(false.sum()))])
    return true, torch.cat([predicted[rows], nothing.expand(int(missed.sum())), predicted[false]])


def image_score(prediction: dict[str, Tensor], truth: dict[str, Tensor], score: float) -> float:
    """Return F1 of an image's predictions: 2 TP / (2 TP + FP + FN); 1 if there is neither object nor prediction."""
    predicted, objects, paired = pairs(prediction, truth, score)
    total = len(predicted) + len(objects)
    right = int((predicted[paired[:, 0]] == objects[paired[:, 1]]).sum())
    return 2 * right / total if total else 1.0


def _intersections(boxes: Tensor, others: Tensor) -> Tensor:
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)  # (p, n)


def _mean(precision: Tensor) -> float:
    """Return the mean of the values above -1, which stands for no object; NaN if there are none."""
    return float(precision[precision > -1].double().mean())
