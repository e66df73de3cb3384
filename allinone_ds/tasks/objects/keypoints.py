"""Keypoints: named points of each object; head `heatmap` on boxes or on the whole image; AP of keypoints as in COCO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torchvision.utils import draw_keypoints
from transformers.utils import ModelOutput

from allinone_ds.data.augmentation.transforms import stack_pixels
from allinone_ds.data.base import Sample
from allinone_ds.data.formats.common.points import mirrored_order
from allinone_ds.errors import ConfigError
from allinone_ds.models.objects.regions import RegionDetector, RegionOptions, decode_heatmaps, heatmap_loss
from allinone_ds.tasks.base import Prediction
from allinone_ds.tasks.drawing import draw_boxes, enlarge, palette
from allinone_ds.tasks.objects.base import ObjectsTask, empty_objects, learned_objects
from allinone_ds.tasks.objects.coco_metric import CocoMetric
from allinone_ds.tasks.objects.points import default_sigmas, has_sides, oks, point_names
from allinone_ds.tasks.test_time import TestTime

_LIMIT = 20
"""Predictions per image and class that COCO's AP of keypoints counts."""
_MARGIN = 0.125
"""How far a region reaches beyond its box, in sides of the box: points lie at the border, and predicted boxes are
inexact."""
_SHOWN_POINT = 0.1
"""Points with a lower score are not drawn."""


class HeatmapOptions(RegionOptions):
    """Options of the keypoint head `heatmap`.

    Example:
        >>> HeatmapOptions(points=["head", "tail"], regions="image").sigmas is None
        True
    """

    points: PositiveInt | list[str] = 17
    """Number or names of the points of an object, as in the data; 17 are those of a person in COCO."""
    sigmas: list[PositiveFloat] | None = Field(None, min_length=1)
    """Tolerance of each point in COCO's similarity, relative to the square root of the object's area; null: COCO's for
    its 17 points, 0.05 for others."""
    regions: Literal["boxes", "image"] = "boxes"
    """Where points are looked for: in the boxes of `fcos`, or in the whole image, which then shows one object."""


class KeypointsTask(ObjectsTask):
    """Predicts the points of each object, its box and its class.

    Labels: for each image {"boxes": (n, 4) float32 XYXY in pixels of the network's input, "labels": (n,) long,
    "keypoints": (n, P, 3) float32: x, y and whether the point is visible}. Crowds are not targets. Loss: mean over the
    positive locations of the micro-batch of the loss of the box plus that of the heatmaps of the object's visible
    points (over the objects with `regions: image`).

    Example:
        >>> import torch
        >>> options = {"width": 16, "points": ["head", "tail"]}
        >>> task = KeypointsTask("fish", ["trout"], channels=8, stride=4, num_levels=1, image_size=(16, 16), **options)
        >>> points = torch.tensor([[[3.0, 4.0, 1.0], [9.0, 11.0, 1.0]]])
        >>> labels = [{"boxes": torch.tensor([[2.0, 2, 10, 12]]), "labels": torch.tensor([0]), "keypoints": points}]
        >>> task((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16), labels).loss.shape
        torch.Size([])
        >>> outputs = task.eval()((torch.randn(1, 8, 4, 4),), torch.randn(1, 3, 16, 16))
        >>> sorted(task.predict(outputs, sizes=[(40, 60)])[0])
        ['boxes', 'keypoints', 'labels', 'point_scores', 'scores']
    """

    kind = "keypoints"
    main_metric = "map50"
    greater_is_better = {"map50": True, "map": True, "map_medium": True, "map_large": True}
    pipeline_tag = "keypoint-detection"
    HEADS = {"heatmap": HeatmapOptions}

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.points = point_names(self.options.points)
        P = len(self.points)
        self.sigmas = self.options.sigmas or default_sigmas(self.points)
        if len(self.sigmas) != P:
            raise ConfigError(
                f"tasks.{name}.options.sigmas: has {len(self.sigmas)} numbers for {P} points; give one per point"
            )
        self.whole_image = self.options.regions == "image"
        if self.whole_image and len(self.classes) > 1:
            raise ConfigError(f"tasks.{name}.options.regions: 'image' finds one object of one class, the data has "
                              f"{len(self.classes)} classes; use 'boxes'")  # fmt: skip
        self.detector = RegionDetector(
            len(self.classes), P, self.channels, self.stride, self.num_levels, self.image_size, self.options,
            self.whole_image, _MARGIN,
        )  # fmt: skip

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> ModelOutput:
        self.check_inputs(pixel_values, labels)
        for target in labels or ():
            self._check(target)
        return self.detector(features, pixel_values, labels, heatmap_loss)

    def _check(self, target: dict[str, Tensor]) -> None:
        count, P = len(target["labels"]), len(self.points)
        if count and target["keypoints"].shape[1] != P:
            raise ConfigError(f"tasks.{self.name}: the data has {target['keypoints'].shape[1]} points per object, "
                              f"options.points is {P}; set it to the number or the names of the points")  # fmt: skip
        if self.whole_image and count > 1:
            raise ConfigError(f"tasks.{self.name}: an image shows {count} objects, but options.regions is 'image', "
                              "which finds one per image; use regions: boxes")  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        labels = []
        for sample in samples:
            target, keep = learned_objects(sample)
            points = sample["keypoints"].as_subclass(Tensor).float()[keep]
            visible = (sample["visible"][keep] > 0).float()[..., None]
            labels.append({**target, "keypoints": torch.cat([points, visible], dim=-1)})
        return {"pixel_values": stack_pixels(samples), "labels": labels}

    @staticmethod
    def unlabelled(sample: Sample) -> Sample:
        """Return the image of a sample without any object."""
        return {
            **empty_objects(sample),
            "keypoints": torch.zeros(0, 0, 2),
            "visible": torch.zeros(0, 0, dtype=torch.uint8),
        }

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return for each image "boxes" (n, 4) XYXY, "scores" (n,), "labels" (n,), "keypoints" (n, P, 2) and
        "point_scores" (n, P), best objects first."""
        predictions = []
        parts = zip(outputs.boxes, outputs.scores, outputs.labels, outputs.maps, strict=True)
        for (boxes, scores, labels, maps), (H, W) in zip(parts, sizes, strict=False):
            points, point_scores = decode_heatmaps(maps, self.detector.region(boxes))
            scale = boxes.new_tensor([W / self.image_size[1], H / self.image_size[0]])
            points = points * scale
            if self.whole_image:  # the box of the points
                boxes, scores = torch.cat([points.amin(1), points.amax(1)], dim=-1), point_scores.mean(-1)
            else:
                boxes = boxes * scale.repeat(2)
            found = {"boxes": boxes, "scores": scores, "labels": labels, "keypoints": points}
            predictions.append({**found, "point_scores": point_scores})
        return predictions

    def check_test_time(self, options: TestTime) -> None:
        """Refuse windows, and mirrored views of points of which it is not known which are left and right.

        Raises:
            ConfigError: names the option and what is allowed.
        """
        super().check_test_time(options)
        if options.flip and not has_sides(self.points):
            raise ConfigError(f"tasks.{self.name}.test_time.flip: no name in options.points contains left or right, so "
                              "that a mirrored view cannot be understood; name the points, or remove it")  # fmt: skip

    def mirrored(self, prediction: Prediction, width: int) -> Prediction:
        order = mirrored_order(self.points)
        x, y = prediction["keypoints"].unbind(-1)
        points = torch.stack([width - x, y], dim=-1)[:, order]
        found = super().mirrored(prediction, width)
        return {**found, "keypoints": points, "point_scores": prediction["point_scores"][:, order]}

    def merged(self, together: Prediction) -> Prediction:
        """Return the objects of an image; with `regions: image`, its mean points, weighted by their scores."""
        return _averaged(together) if self.whole_image else super().merged(together)

    def lowest_score(self) -> float:
        return 0.0 if self.whole_image else super().lowest_score()

    def metric(self) -> CocoMetric:
        return CocoMetric(self.sigmas, max(self.detector.max_detections, _LIMIT), self.shown_score)

    def sample_score(self, prediction: Prediction, sample: Sample) -> float | None:
        """Return the mean over the objects of the largest similarity (OKS) of a drawn prediction; None: no object."""
        visible = sample["visible"]
        counted = (visible > 0).any(-1)
        if not counted.any():
            return None
        keep = prediction["scores"].cpu() >= self.shown_score
        if not keep.any():
            return 0.0
        sides = sample["boxes"].as_subclass(Tensor)[:, 2:] - sample["boxes"].as_subclass(Tensor)[:, :2]
        area = sample.get("area", sides.prod(-1))[counted]
        truth = sample["keypoints"].as_subclass(Tensor)[counted]
        similar = oks(prediction["keypoints"].cpu()[keep], truth, visible[counted], area, self.sigmas)
        return float(similar.amax(0).mean())

    @staticmethod
    def drawn(image: Tensor, objects: Any, names: Sequence[str], num_classes: int, large: bool = True) -> Tensor:
        """Return the image with the boxes of objects, and their visible points, each point in a colour of its own."""
        image, factor = enlarge(image) if large else (image, 1)
        boxes = objects["boxes"].as_subclass(Tensor) * factor
        image = draw_boxes(image, boxes, objects["labels"], list(names), num_classes)
        points = objects["keypoints"].as_subclass(Tensor) * factor
        visible = objects["visible"] > 0 if "visible" in objects else objects["point_scores"] >= _SHOWN_POINT
        for place, color in enumerate(palette(points.shape[1]) if len(points) else ()):
            these = slice(place, place + 1)
            image = draw_keypoints(image, points[:, these], colors=color, radius=4, visibility=visible[:, these])
        return image

    def described(self, shown: Prediction) -> list[dict[str, Any]]:
        """Return for each object, by the names of its points, x and y in pixels and the score."""
        rows = torch.cat([shown["keypoints"], shown["point_scores"][..., None]], dim=-1).tolist()
        return [
            {
                "points": {
                    name: [round(x, 2), round(y, 2), round(score, 4)]
                    for name, (x, y, score) in zip(self.points, points, strict=True)
                }
            }
            for points in rows
        ]

    @staticmethod
    def draw_truth(sample: Sample, classes: Sequence[str]) -> tuple[Tensor, str]:
        """Return the image with the boxes and visible points of its objects, and their numbers."""
        drawn = KeypointsTask.drawn(sample["image"].as_subclass(Tensor), sample, [], len(classes), large=False)
        count = len(sample["labels"])
        objects = "1 object" if count == 1 else f"{count} objects"
        return drawn, f"{objects}, {int((sample['visible'] > 0).sum())} visible points"

    def export_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """Return "boxes" (B, N, 4), "keypoints" (B, N, P, 2), both in pixels of the network's input, "scores" and
        "labels" (B, N), "point_scores" (B, N, P).

        The N best locations are not yet reduced by non-maximum suppression.
        """
        boxes, maps = torch.stack(list(outputs.boxes)), torch.stack(list(outputs.maps))
        points, point_scores = decode_heatmaps(maps.flatten(0, 1), self.detector.region(boxes.flatten(0, 1)))
        count = boxes.shape[1]
        return {
            "boxes": boxes,
            "scores": torch.stack(list(outputs.scores)),
            "labels": torch.stack(list(outputs.labels)),
            "keypoints": points.unflatten(0, (-1, count)),
            "point_scores": point_scores.unflatten(0, (-1, count)),
        }


def _averaged(views: Prediction) -> Prediction:
    """Return the one object of an image from its views, each an entry of the first axis."""
    weights = views["point_scores"] / views["point_scores"].sum(0).clamp(min=1e-9)  # (views, P)
    points = (views["keypoints"] * weights[..., None]).sum(0, keepdim=True)
    return {
        "boxes": torch.cat([points.amin(1), points.amax(1)], dim=-1),
        "scores": views["scores"].mean(0, keepdim=True),
        "labels": views["labels"][:1],
        "keypoints": points,
        "point_scores": views["point_scores"].mean(0, keepdim=True),
    }
