"""Instance segmentation: a mask per object; heads `fcos_masks` and `mask2former`; mAP of masks as COCO defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_segmentation_masks
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.models.mask2former import Mask2FormerOptions
from allinone_ds.models.objects.mask2former_instances import Mask2FormerInstances
from allinone_ds.models.objects.regions import RegionDetector, RegionOptions, mask_loss, paste_masks
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.detection_metric import SIZES
from allinone_ds.tasks.drawing import draw_boxes, enlarge, enlarge_mask, palette
from allinone_ds.tasks.objects.base import ObjectsTask, empty_objects, learned_objects
from allinone_ds.tasks.objects.coco_metric import IMAGE_LIMIT, CocoMetric, encode

_COUNTED = 2000
"""Training images whose objects are counted at the start, for balanced class weights."""


class InstancesTask(ObjectsTask):
    """Predicts a mask, a box and a class for each object.

    Labels: for each image {"boxes": (n, 4) float32 XYXY in pixels of the network's input, "labels": (n,) long,
    "masks": (n, H, W) bool}. Crowds and objects whose mask has no pixel are not targets. Loss: mean over the objects
    of the micro-batch (over their positive locations for the head `fcos_masks`).

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

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        K = len(self.classes)
        self.detector: RegionDetector | Mask2FormerInstances
        if self.head_name == "mask2former":
            self.detector = Mask2FormerInstances(K, self.channels, self.num_levels, self.options)
        else:
            self.detector = RegionDetector(
                K, K, self.channels, self.stride, self.num_levels, self.image_size, self.options
            )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        self.check_inputs(pixel_values, labels)
        if isinstance(self.detector, Mask2FormerInstances):
            return self.detector(features, labels)
        return self.detector(features, pixel_values, labels, mask_loss)

    def samples_to_count(self) -> int:
        counted = isinstance(self.detector, Mask2FormerInstances) and self.detector.needs_frequencies()
        return _COUNTED if counted else 0

    def class_shares(self, sample: Sample) -> Tensor | None:
        labels = torch.as_tensor(sample["labels"]).long()
        return torch.bincount(labels, minlength=len(self.classes)) / len(labels) if len(labels) else None

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set balanced class weights of `mask2former`."""
        if isinstance(self.detector, Mask2FormerInstances):
            self.detector.use_frequencies(frequencies)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = []
        for sample in samples:
            target, keep = learned_objects(sample)
            masks = sample["masks"].as_subclass(Tensor).bool().reshape(-1, *sample["image"].shape[-2:])[keep]
            some = masks.flatten(1).any(1)
            labels.append({key: value[some] for key, value in {**target, "masks": masks}.items()})
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without any object."""
        return {**empty_objects(sample), "masks": torch.zeros(0, *sample["image"].shape[-2:], dtype=torch.uint8)}

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image "boxes" (n, 4) XYXY, "scores" (n,), "labels" (n,) and "masks" bool (n, H, W)."""
        if isinstance(self.detector, Mask2FormerInstances):
            return self.detector.postprocess(outputs, sizes)
        predictions = []
        parts = zip(outputs.boxes, outputs.scores, outputs.labels, outputs.maps, strict=True)
        for (boxes, scores, labels, maps), (H, W) in zip(parts, sizes, strict=False):
            scale = boxes.new_tensor([W / self.image_size[1], H / self.image_size[0]]).repeat(2)
            boxes = boxes * scale
            own = maps[torch.arange(len(maps), device=maps.device), labels]
            masks = paste_masks(own, boxes, (H, W))
            predictions.append({"boxes": boxes, "scores": scores, "labels": labels, "masks": masks})
        return predictions

    def mirrored(self, prediction: Prediction, width: int) -> Prediction:
        return {**super().mirrored(prediction, width), "masks": prediction["masks"].flip(-1)}

    def lowest_score(self) -> float:
        return 0.0 if isinstance(self.detector, Mask2FormerInstances) else super().lowest_score()

    def metric(self) -> CocoMetric:
        return CocoMetric(None, max(self.detector.max_detections, IMAGE_LIMIT), self.shown_score)

    @staticmethod
    def drawn(image: Tensor, objects: Any, names: Sequence[str], num_classes: int, large: bool = True) -> Tensor:
        """Return the image with masks, each in a colour of its own, and boxes in the colours of their classes."""
        image, factor = enlarge(image) if large else (image, 1)
        masks = enlarge_mask(objects["masks"], factor).bool()
        if len(masks):
            image = draw_segmentation_masks(image, masks, 0.5, palette(len(masks)))
        boxes = objects["boxes"].as_subclass(Tensor) * factor
        return draw_boxes(image, boxes, objects["labels"], list(names), num_classes)

    def described(self, shown: Prediction) -> list[dict[str, Any]]:
        """Return the mask of each object in COCO's run lengths."""
        codes = encode(shown["masks"])
        return [{"mask": {"size": list(code["size"]), "counts": code["counts"].decode()}} for code in codes]

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with the masks and boxes of its objects, and their number."""
        count = len(sample["labels"])
        drawn = InstancesTask.drawn(sample["image"].as_subclass(Tensor), sample, [], len(classes), large=False)
        return drawn, "1 object" if count == 1 else f"{count} objects"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "boxes" (B, N, 4) in pixels of the network's input, "scores", "labels" (B, N) and "masks".

        `fcos_masks`: "masks" (B, N, S, S) are logits in the box, of its class. The N best locations are not yet
        reduced by non-maximum suppression. `mask2former`: "class_logits" (B, Q, K + 1) and "mask_logits" (B, Q, h, w).
        """
        if isinstance(self.detector, Mask2FormerInstances):
            return {"class_logits": outputs.class_queries_logits, "mask_logits": outputs.masks_queries_logits}
        maps, labels = torch.stack(list(outputs.maps)), torch.stack(list(outputs.labels))
        index = labels[:, :, None, None, None].expand(*labels.shape, 1, *maps.shape[-2:])
        return {
            "boxes": torch.stack(list(outputs.boxes)),
            "scores": torch.stack(list(outputs.scores)),
            "labels": labels,
            "masks": maps.gather(2, index)[:, :, 0],
        }
