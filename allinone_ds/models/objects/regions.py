"""Boxes of FCOS and, for the region of each box, maps of one head: the branch of Mask R-CNN and Keypoint R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from transformers.utils import ModelOutput

from allinone_ds.device_constants import constant
from allinone_ds.models.fcos import FCOSDetector, FCOSOptions
from allinone_ds.models.pyramid import ChannelNorm, Fuse, SimpleFeaturePyramid


class RegionOptions(FCOSOptions):
    """Options of a head that predicts maps for the regions of FCOS's boxes, with those of `fcos`.

    Example:
        >>> RegionOptions(width=64, region_size=14).region_scale
        2.0
    """

    region_scale: Literal[4.0, 2.0, 1.0, 0.5] = 2.0  # type: ignore[valid-type]
    """Resolution of the map that regions are cut from, relative to the backbone's maps."""
    region_size: int = Field(14, ge=2)
    """Cells per side of a region; the predicted map has twice as many."""
    region_convs: int = Field(2, ge=0)
    """3x3 convolutions on a region."""
    region_weight: float = Field(1.0, gt=0)
    """Factor of the loss of the maps; that of the boxes has 1."""
    jitter: float = Field(0.05, ge=0, lt=0.25)
    """Standard deviation of the noise on the corners of a training region, in sides of its box; regions of predicted
    boxes are as inexact."""


@dataclass
class RegionOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: loss of the boxes plus that of the maps, float32.
        boxes: for each image (n, 4) XYXY in pixels of the network's input, best first.
        scores: for each image (n,).
        labels: for each image (n,).
        maps: for each image the logits (n, M, 2 S, 2 S) of the regions, float32.
    """

    loss: Tensor | None = None
    boxes: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    labels: tuple[Tensor, ...] | None = None
    maps: tuple[Tensor, ...] | None = None


class RegionDetector(nn.Module):
    """FCOS, and a tower of convolutions on the regions of its boxes (https://arxiv.org/abs/1703.06870).

    In training the regions are those of the true boxes, moved a little. While a graph is exported, and in training
    without labels, the best locations take the place of the boxes that non-maximum suppression keeps, so that shapes do
    not depend on values.

    Args:
        num_classes: K.
        num_maps: M maps per region.
        channels: channels of each of the backbone's maps.
        stride: pixels per cell of the backbone's maps.
        num_levels: number of the backbone's maps.
        image_size: (H, W) of the network's input in pixels.
        options: see `RegionOptions`.
        whole_image: the only region of an image is the whole image; there are no boxes to learn.
        margin: how far a region reaches beyond each side of its box, in sides of the box.
    """

    def __init__(
        self,
        num_classes: int,
        num_maps: int,
        channels: int,
        stride: int,
        num_levels: int,
        image_size: tuple[int, int],
        options: RegionOptions,
        whole_image: bool = False,
        margin: float = 0.0,
    ) -> None:
        super().__init__()
        width = options.width
        self.margin = 0.0 if whole_image else margin
        self.options, self.max_detections = options, 1 if whole_image else options.max_detections
        self.image_size = image_size
        self.detector = None
        if not whole_image:
            self.detector = FCOSDetector(num_classes, channels, stride, num_levels, image_size, options)
        self.spatial_scale = options.region_scale / stride
        self.fuse = Fuse(channels, num_levels, width)
        self.pyramid = SimpleFeaturePyramid(width, width, [options.region_scale])
        layers: list[nn.Module] = []
        for _ in range(options.region_convs):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), ChannelNorm(width), nn.GELU()]
        self.tower = nn.Sequential(*layers, nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU())
        self.output = nn.Conv2d(width, num_maps, 1)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(
        self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any, region_loss: Any
    ) -> RegionOutput:
        """Return the predictions, in training only if no labels are given, and the loss if labels are given.

        Args:
            features: the backbone's maps.
            pixel_values: (B, 3, H, W).
            labels: for each image {"boxes": (n, 4), "labels": (n,), ...}; None: no loss.
            region_loss: returns the losses (N,) of maps (N, M, 2 S, 2 S) in regions, for each image (n, 4), and the
                labels.
        """
        detected = None if self.detector is None else self.detector(features, pixel_values, labels)
        level = self.pyramid(self.fuse(features))[0]
        out = RegionOutput()
        if labels is not None:
            regions = self._training_regions(labels)
            with torch.autocast(pixel_values.device.type, enabled=False):
                maps = self._maps(level, regions)
                weights = self._weights(labels, maps)
                loss = (weights * region_loss(maps, regions, labels)).sum() / weights.sum().clamp(min=1)
                loss = self.options.region_weight * loss + (maps * 0.0).sum()
                out.loss = loss if detected is None else loss + detected.loss
            if self.training:
                return out
        found = self._found(detected, pixel_values)
        maps = self._maps(level, [self.region(image["boxes"]) for image in found])
        out.boxes, out.scores, out.labels = (tuple(i[key] for i in found) for key in ("boxes", "scores", "labels"))
        out.maps = maps.split([len(image["boxes"]) for image in found])
        return out

    def _maps(self, level: Tensor, regions: Sequence[Tensor]) -> Tensor:
        """Return the maps of all regions (N, M, 2 S, 2 S) in float32."""
        crops = roi_align(level.float(), list(regions), self.options.region_size, self.spatial_scale, 2, aligned=True)
        return self.output(self.tower(crops.to(level.dtype))).float()

    def count_labels(self, labels: list[dict[str, Tensor]]) -> int:
        """Return the number that the loss is divided by: positive locations of FCOS, or objects without it."""
        return sum(len(t["labels"]) for t in labels) if self.detector is None else self.detector.count_labels(labels)

    def _weights(self, labels: Any, maps: Tensor) -> Tensor:
        """Return how much each object counts (N,): as often as it has positive locations, so that a loss has one
        denominator.
        """
        if self.detector is None:
            return maps.new_ones(len(maps))
        matched = self.detector.matches(labels)
        counts = [_count(places, len(target["labels"])) for places, target in zip(matched, labels, strict=True)]
        return torch.cat(counts).to(maps.dtype)

    def _whole(self, pixels: Tensor) -> Tensor:
        """Return the box of the whole image (1, 4)."""
        return constant([[0, 0, self.image_size[1], self.image_size[0]]], like=pixels)

    def _training_regions(self, labels: Any) -> list[Tensor]:
        """Return the true boxes of each image (n, 4), their corners moved a little in training."""
        if self.detector is None:
            return [self._whole(target["boxes"]).expand(len(target["boxes"]), 4) for target in labels]
        regions = []
        for target in labels:
            boxes = target["boxes"]
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            noise = torch.randn_like(boxes).clamp(-2, 2) * self.options.jitter if self.training else 0.0
            regions.append(self.region(boxes + noise * sides))
        return regions

    def region(self, boxes: Tensor) -> Tensor:
        """Return the regions (n, 4) that belong to boxes (n, 4) XYXY in pixels."""
        sides = boxes[:, 2:] - boxes[:, :2]
        return boxes + self.margin * torch.cat([-sides, sides], dim=1)

    def _found(self, detected: Any, pixels: Tensor) -> list[dict[str, Tensor]]:
        """Return for each image boxes, scores and labels."""
        if detected is None:
            label = torch.zeros(1, dtype=torch.long, device=pixels.device)
            whole = self._whole(pixels)
            return [{"boxes": whole, "scores": whole.new_ones(1), "labels": label} for _ in range(len(pixels))]
        assert self.detector is not None
        if not (self.training or torch.compiler.is_exporting()):
            return self.detector.postprocess(detected)
        boxes, scores = self.detector.decode(detected)
        best, labels = scores.max(-1)  # (B, A)
        best, places = best.topk(min(self.max_detections, best.shape[1]), dim=1)
        boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4))
        labels = labels.gather(1, places)
        return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, best, labels, strict=True)]


def mask_loss(maps: Tensor, regions: Sequence[Tensor], labels: Any) -> Tensor:
    """Return for each object the mean binary cross-entropy of its mask over the cells of its region (N,).

    Args:
        maps: (N, K, S, S) logits, one map per class.
        regions: for each image (n, 4) XYXY in pixels of the network's input.
        labels: for each image {"labels": (n,), "masks": (n, H, W)}.
    """
    S = maps.shape[-1]
    targets = [maps.new_zeros(0, S, S)]
    for boxes, target in zip(regions, labels, strict=True):
        if len(boxes):
            own = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
            masks = target["masks"][:, None].to(maps.dtype)
            targets.append(roi_align(masks, torch.cat([own, boxes], dim=1), S, aligned=True)[:, 0])
    label = torch.cat([target["labels"] for target in labels])
    chosen = maps.gather(1, label[:, None, None, None].expand(-1, 1, S, S))[:, 0]
    return F.binary_cross_entropy_with_logits(chosen, torch.cat(targets), reduction="none").mean((-2, -1))


def heatmap_loss(maps: Tensor, regions: Sequence[Tensor], labels: Any) -> Tensor:
    """Return for each object the mean divergence of its heatmaps from a Gaussian of one cell around the point (N,).

    Points that are not visible or outside of their region do not count; without any other the loss is 0.

    Args:
        maps: (N, P, S, S) logits, one map per point.
        regions: for each image (n, 4) XYXY in pixels of the network's input.
        labels: for each image {"keypoints": (n, P, 3)}: x, y, visibility.
    """
    N, P, S, _ = maps.shape
    points = torch.cat([target["keypoints"].reshape(len(target["boxes"]), P, 3) for target in labels])  # (N, P, 3)
    boxes = torch.cat(list(regions))[:, None]  # (N, 1, 4)
    place = (points[..., :2] - boxes[..., :2]) / (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6) * S  # in cells
    counted = (points[..., 2] > 0) & (place >= 0).all(-1) & (place <= S).all(-1)
    cells = torch.arange(S, device=maps.device) + 0.5
    along = ((cells - place[..., None]).square() * -0.5).softmax(-1)  # (N, P, 2, S)
    target = (along[:, :, 1, :, None] * along[:, :, 0, None, :]).flatten(2)  # (N, P, S * S)
    each = F.kl_div(maps.flatten(2).log_softmax(-1), target, reduction="none").sum(-1)
    return torch.where(counted, each, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def decode_heatmaps(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points (n, P, 2) in pixels and their scores (n, P): the probability at and beside the peak.

    A parabola through the logits of the peak and its two neighbours, along each side, gives the position within the
    cell, exactly if the heatmap is a Gaussian (https://arxiv.org/abs/1910.06278).

    Args:
        maps: logits (n, P, S, S).
        boxes: (n, 4) XYXY of the regions in pixels.
    """
    n, P, S, _ = maps.shape
    logits = maps.float().flatten(2).log_softmax(-1)
    peak = logits.argmax(-1)  # (n, P)
    x, y = peak % S, peak // S

    def beside(place: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the logits (n, P) before and after the peak along a side, continued by the Gaussian at the border."""
        before = logits.gather(2, (peak - step).clamp(min=0)[..., None])[..., 0]
        after = logits.gather(2, (peak + step).clamp(max=S * S - 1)[..., None])[..., 0]
        before, after = (
            torch.where(place == 0, 2 * middle - after - 1, before),
            torch.where(place == S - 1, 2 * middle - before - 1, after),
        )
        return before, after

    middle = logits.gather(2, peak[..., None])[..., 0]
    sides = [beside(x, 1), beside(y, S)]
    within = [(after - before) / (2 * (2 * middle - before - after)).clamp(min=1e-6) for before, after in sides]
    cell = torch.stack([x, y], dim=-1) + 0.5 + torch.stack(within, dim=-1).clamp(-0.5, 0.5)
    points = boxes[:, None, :2] + cell / S * (boxes[:, 2:] - boxes[:, :2])[:, None]
    score = middle.exp() + sum(before.exp() + after.exp() for before, after in sides)
    return points, score.clamp(max=1.0)


def paste_masks(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks of regions in the image, bool (n, H, W).

    Args:
        maps: logits (n, S, S).
        boxes: (n, 4) XYXY of the regions in pixels of the image.
        size: (H, W) of the image.
    """
    H, W = size
    y = torch.arange(H, device=maps.device) + 0.5
    x = torch.arange(W, device=maps.device) + 0.5
    masks = torch.zeros(len(maps), H, W, dtype=torch.bool, device=maps.device)
    for i, (logits, box) in enumerate(zip(maps, boxes, strict=True)):  # one at a time: masks of large images
        across = 2 * (x - box[0]) / (box[2] - box[0]).clamp(min=1e-6) - 1
        down = 2 * (y - box[1]) / (box[3] - box[1]).clamp(min=1e-6) - 1
        grid = torch.stack([across[None].expand(H, W), down[:, None].expand(H, W)], dim=-1)[None]
        inside = (grid.abs() <= 1).all(-1)[0]
        sampled = F.grid_sample(logits[None, None].float(), grid, padding_mode="border", align_corners=False)[0, 0]
        masks[i] = (sampled > 0) & inside
    return masks


def _count(places: Tensor, size: int) -> Tensor:
    """Return how often each of 0..size - 1 is in `places` (N,), without a wait for the device; -1 counts nowhere."""
    counts = torch.zeros(size + 1, device=places.device)
    return counts.index_add_(0, (places + 1).clamp(min=0), torch.ones_like(places, dtype=counts.dtype))[1:]
