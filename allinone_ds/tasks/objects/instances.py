"""Instance segmentation: a mask per object; heads `fcos_masks` and `mask2former`; mAP of masks as COCO defines it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, masks_to_boxes
from torchvision.utils import draw_segmentation_masks
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.models.mask2former import Mask2FormerOptions
from allinone_ds.models.objects.mask2former_instances import Mask2FormerInstances
from allinone_ds.models.objects.regions import RegionDetector, RegionOptions, mask_loss, paste_masks
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.details import Details
from allinone_ds.tasks.detection_metric import SIZES, image_score, truth_of
from allinone_ds.tasks.drawing import beside, caption, draw_boxes, enlarge, enlarge_mask, palette
from allinone_ds.tasks.objects.coco_metric import IMAGE_LIMIT, CocoMetric, encode
from allinone_ds.tasks.objects.targets import check_lowest, empty_objects, learned_objects
from allinone_ds.tasks.test_time import TestTime, View
from allinone_ds.tasks.vectors.pooling import refuse_windows

_COUNTED = 2000
"""Training images whose objects are counted at the start, for balanced class weights."""
_SAME_OBJECT = 0.6
"""IoU of boxes above which objects of one class in different views count as one."""


class InstancesTask(Task):
    """Predicts a mask, a box and a class for each object.

    Labels: for each image {"boxes": (n, 4) float32 XYXY in pixels of the network's input, "labels": (n,) long,
    "masks": (n, H, W) bool}. Crowds are not targets. Loss: mean over the objects of the micro-batch (over their
    positive locations for the head `fcos_masks`).

    Example:
        >>> import torch
        >>> task = InstancesTask("inst", ["car"], channels=8, stride=4, num_levels=1, image_size=(16, 16), width=16)
        >>> masks = torch.zeros(1, 16, 16, dtype=torch.bool)
        >>> masks[0, 2:12, 2:10] = True
        >>> labels = [{"boxes": torch.tensor([[2.0, 2.0, 10.0, 12.0]]), "labels": torch.tensor([0]), "masks": masks}]
        >>> task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels).loss.shape
        torch.Size([])
        >>> outputs = task.eval()((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16))
        >>> sorted(task.predict(outputs, sizes=[(40, 60)])[0])
        ['boxes', 'labels', 'masks', 'scores']
    """

    kind = "instances"
    main_metric = "map50"
    greater_is_better = {"map50": True, "map": True, **{f"map_{size}": True for size in SIZES}}
    pipeline_tag = "image-segmentation"
    HEADS = {"fcos_masks": RegionOptions, "mask2former": Mask2FormerOptions}
    shown_score = 0.3
    """Predictions with a lower score are neither drawn nor written to JSON."""

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        K = len(self.classes)
        self.segmenter: RegionDetector | Mask2FormerInstances
        if self.head_name == "mask2former":
            self.segmenter = Mask2FormerInstances(K, self.channels, self.num_levels, self.options)
        else:
            self.segmenter = RegionDetector(
                K, K, self.channels, self.stride, self.num_levels, self.image_size, self.options
            )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        if isinstance(self.segmenter, Mask2FormerInstances):
            return self.segmenter(features, labels)
        return self.segmenter(features, pixel_values, labels, mask_loss)

    def samples_to_count(self) -> int:
        counted = isinstance(self.segmenter, Mask2FormerInstances) and self.segmenter.needs_frequencies()
        return _COUNTED if counted else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        labels = torch.as_tensor(sample["labels"]).long()
        return torch.bincount(labels, minlength=len(self.classes)) / len(labels) if len(labels) else None

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set balanced class weights of `mask2former`."""
        if isinstance(self.segmenter, Mask2FormerInstances):
            self.segmenter.use_frequencies(frequencies)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = []
        for sample in samples:
            target, keep = learned_objects(sample)
            masks = sample["masks"].as_subclass(Tensor).bool()
            labels.append({**target, "masks": masks.reshape(-1, *sample["image"].shape[-2:])[keep]})
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    def count_labels(self, labels: Any) -> int:
        """Return the number of positive locations of `fcos_masks`; of objects, and images without, of `mask2former`."""
        return self.segmenter.count_labels(labels)

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without any object."""
        return {**empty_objects(sample), "masks": torch.zeros(0, *sample["image"].shape[-2:], dtype=torch.uint8)}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image "boxes" (n, 4) XYXY, "scores" (n,), "labels" (n,) and "masks" bool (n, H, W)."""
        if isinstance(self.segmenter, Mask2FormerInstances):
            return self._from_queries(self.segmenter, outputs, sizes)
        predictions = []
        parts = zip(outputs.boxes, outputs.scores, outputs.labels, outputs.maps, strict=True)
        for (boxes, scores, labels, maps), (H, W) in zip(parts, sizes, strict=False):
            scale = boxes.new_tensor([W / self.image_size[1], H / self.image_size[0]]).repeat(2)
            boxes = boxes * scale
            own = maps[torch.arange(len(maps), device=maps.device), labels]
            masks = paste_masks(own, boxes, (H, W))
            predictions.append({"boxes": boxes, "scores": scores, "labels": labels, "masks": masks})
        return predictions

    def _from_queries(
        self, segmenter: Mask2FormerInstances, outputs: Any, sizes: Sequence[tuple[int, int]]
    ) -> list[Prediction]:
        predictions = []
        for i, size in enumerate(sizes):
            one = type(outputs)(
                class_queries_logits=outputs.class_queries_logits[i : i + 1],
                masks_queries_logits=outputs.masks_queries_logits[i : i + 1],
            )
            found = segmenter.found(one, size)[0]
            masks = found["masks"] > 0
            some = masks.flatten(1).any(1)
            boxes = masks_to_boxes(masks[some])
            boxes[:, 2:] += 1  # the last pixel belongs to the box
            predictions.append(
                {"boxes": boxes, "scores": found["scores"][some], "labels": found["labels"][some], "masks": masks[some]}
            )
        return predictions

    def check_test_time(self, options: TestTime) -> None:
        refuse_windows(self, options)

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the objects of all views, without the weaker of two of one class whose boxes overlap by 0.6."""
        of_image: list[list[Prediction]] = [[] for _ in sizes]
        for view in views:
            with self.at_size(view.size):
                predictions = self.predict(view.outputs[0], sizes)
            for image, prediction, (_, W) in zip(of_image, predictions, sizes, strict=True):
                if view.flipped:
                    x0, y0, x1, y1 = prediction["boxes"].unbind(-1)
                    prediction["boxes"] = torch.stack([W - x1, y0, W - x0, y1], dim=-1)
                    prediction["masks"] = prediction["masks"].flip(-1)
                image.append(prediction)
        merged = []
        for image in of_image:
            together = {key: torch.cat([view[key] for view in image]) for key in image[0]}
            keep = batched_nms(together["boxes"], together["scores"], together["labels"], _SAME_OBJECT)
            keep = keep[: self.segmenter.max_detections]
            merged.append({key: value[keep] for key, value in together.items()})
        return merged

    @contextlib.contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        before = self.image_size
        with super().at_size(size):
            if isinstance(self.segmenter, RegionDetector):
                self.segmenter.image_size = size
            try:
                yield
            finally:
                if isinstance(self.segmenter, RegionDetector):
                    self.segmenter.image_size = before

    def check_threshold(self, threshold: float) -> None:
        super().check_threshold(threshold)
        if isinstance(self.segmenter, RegionDetector):
            check_lowest(self.name, threshold, self.options.score_threshold)

    def metric(self) -> CocoMetric:
        return CocoMetric(None, max(self.segmenter.max_detections, IMAGE_LIMIT), self.shown_score)

    def details(self, metric: Any) -> Details:
        return metric.details(self.classes) if isinstance(metric, CocoMetric) else {}

    def sample_score(self, prediction: Prediction, sample: Sample) -> float:
        """Return F1 of the boxes that are drawn, at IoU 0.5."""
        cpu = {key: prediction[key].detach().cpu() for key in ("boxes", "scores", "labels")}
        return image_score(cpu, truth_of(sample), self.shown_score)

    @torch.no_grad()
    def draw(self, image: Tensor, prediction: Prediction, sample: Sample | None = None) -> Tensor:
        keep = prediction["scores"] >= self.shown_score
        shown = {key: value[keep].cpu() for key, value in prediction.items()}
        pairs = zip(shown["labels"].tolist(), shown["scores"].tolist(), strict=True)
        drawn = _drawn(image.cpu(), shown, [f"{self.classes[k]} {score:.2f}" for k, score in pairs], len(self.classes))
        if sample is None:
            return drawn
        names = [self.classes[k] for k in sample["labels"].tolist()]
        truth = _drawn(image.cpu(), sample, names, len(self.classes))
        return beside(caption(drawn, ["predicted"]), caption(truth, ["true"]))

    def to_json(self, prediction: Prediction) -> dict[str, Any]:
        """Return the objects, best first: class, score, box (XYXY in pixels) and mask in COCO's run lengths."""
        keep = prediction["scores"] >= self.shown_score
        rows = zip(*(prediction[key][keep].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        codes = encode(prediction["masks"][keep])
        return {
            "objects": [
                {
                    "class": self.classes[k],
                    "score": round(score, 4),
                    "box": [round(side, 2) for side in box],
                    "mask": {"size": list(code["size"]), "counts": code["counts"].decode()},
                }
                for (k, score, box), code in zip(rows, codes, strict=True)
            ]
        }

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with the masks and boxes of its objects, and their number."""
        count = len(sample["labels"])
        drawn = _drawn(sample["image"].as_subclass(Tensor), sample, [], len(classes), large=False)
        return drawn, "1 object" if count == 1 else f"{count} objects"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "boxes" (B, N, 4) in pixels of the network's input, "scores", "labels" (B, N) and "masks".

        `fcos_masks`: "masks" (B, N, S, S) are logits in the box, of its class. The N best locations are not yet
        reduced by non-maximum suppression. `mask2former`: "class_logits" (B, Q, K + 1) and "mask_logits" (B, Q, h, w).
        """
        if isinstance(self.segmenter, Mask2FormerInstances):
            return {"class_logits": outputs.class_queries_logits, "mask_logits": outputs.masks_queries_logits}
        maps, labels = torch.stack(list(outputs.maps)), torch.stack(list(outputs.labels))
        index = labels[:, :, None, None, None].expand(*labels.shape, 1, *maps.shape[-2:])
        return {
            "boxes": torch.stack(list(outputs.boxes)),
            "scores": torch.stack(list(outputs.scores)),
            "labels": labels,
            "masks": maps.gather(2, index)[:, :, 0],
        }


def _drawn(image: Tensor, objects: Any, names: list[str], num_classes: int, large: bool = True) -> Tensor:
    """Return the image with the masks of objects, each in a colour of its own, and boxes in those of the classes."""
    factor = 1
    if large:
        image, factor = enlarge(image)
    masks = enlarge_mask(objects["masks"], factor).bool()
    if len(masks):
        image = draw_segmentation_masks(image, masks, 0.5, palette(len(masks)))
    boxes = objects["boxes"].as_subclass(Tensor) * factor
    return draw_boxes(image, boxes, objects["labels"].cpu(), names, num_classes)
