"""The detection head FCOS: torchvision's head, loss and post-processing on the feature maps of a plain ViT."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from transformers.utils import ModelOutput

from allinone_ds.models.pyramid import Fuse, SimpleFeaturePyramid, group_norm
from allinone_ds.strict import Strict

_INVERSE_SOFTPLUS_1 = 0.5413  # softplus of it is 1: every distance starts at one anchor side


class FCOSOptions(Strict):
    """Options of the detection head `fcos`.

    Example:
        >>> FCOSOptions(width=64, scales=[2.0, 1.0, 0.5]).num_convs
        4
    """

    width: int = Field(256, ge=1)
    """Channels of the neck and of both towers."""
    num_convs: int = Field(4, ge=0)
    """3x3 convolutions in each tower."""
    scales: list[float] = [1.0]
    """Resolution of the levels relative to the backbone's maps, finest first; [1.0] means one level, no pyramid."""
    anchor_scale: float = Field(2.0, gt=0)
    """Side of an anchor in strides of its level; box distances and `center_radius` are in units of it."""
    center_radius: float = Field(1.5, gt=0)
    """A location is positive if it is closer to a box centre than this, in anchor sides."""
    prior: float = Field(0.01, gt=0, lt=1)
    """Initial score of every class at every location."""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """Predictions with a lower score are dropped."""
    nms_threshold: float = Field(0.6, gt=0, le=1)
    """IoU above which the weaker of two boxes of one class is dropped."""
    max_detections: int = Field(100, ge=1)
    """Boxes kept per image. Above 100, it is also the number of boxes per image and class that mAP counts."""


@dataclass
class FCOSOutput(ModelOutput):
    """Raw predictions at A locations over all levels.

    Attributes:
        loss: sum of the classification, box and centerness losses, float32.
        cls_logits: (B, A, K) float32.
        bbox_regression: (B, A, 4) float32, distances to the left, top, right and bottom side in anchor sides.
        bbox_ctrness: (B, A, 1) float32.
        anchors: for each level (A_level, 4) float32, XYXY in pixels of the network's input.
    """

    loss: Tensor | None = None
    cls_logits: Tensor | None = None
    bbox_regression: Tensor | None = None
    bbox_ctrness: Tensor | None = None
    anchors: tuple[Tensor, ...] | None = None


class FCOSDetector(nn.Module):
    """FCOS (https://arxiv.org/abs/1904.01355) of torchvision without its transform and backbone.

    It differs from torchvision's defaults in three ways. Distances pass through a softplus: after torchvision's ReLU
    they have no gradient once all inputs are negative, and the box loss then stays at exactly 1. On eight toy images
    this happened with 2 of 6 seeds at AdamW's learning rate 3e-3 and with 3 of 6 at 1e-2, but never with the softplus.
    Distances start at one anchor side instead of zero. Locations are at the centre of their cell.

    Args:
        num_classes: K.
        channels: channels of each of the backbone's maps.
        stride: pixels per cell of the backbone's maps.
        num_levels: number of the backbone's maps, which a 1x1 convolution fuses.
        image_size: (H, W) of the network's input in pixels.
        options: see `FCOSOptions`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        stride: int,
        num_levels: int,
        image_size: tuple[int, int],
        options: FCOSOptions,
    ) -> None:
        super().__init__()
        width = options.width
        self.image_size = image_size
        self.max_detections = options.max_detections
        self.strides = [stride / scale for scale in options.scales]
        self.fuse = Fuse(channels, num_levels, width)
        single = list(options.scales) == [1.0]
        self.pyramid = None if single else SimpleFeaturePyramid(width, width, options.scales)

        head = FCOSHead(width, 1, num_classes, num_convs=0)  # its towers are built below, with a norm for any width
        head.classification_head = FCOSClassificationHead(
            width, 1, num_classes, options.num_convs, prior_probability=options.prior, norm_layer=group_norm
        )
        head.regression_head = FCOSRegressionHead(width, 1, options.num_convs, norm_layer=group_norm)
        nn.init.constant_(head.regression_head.bbox_reg.bias, _INVERSE_SOFTPLUS_1)  # type: ignore[arg-type]
        head.regression_head.bbox_reg = nn.Sequential(head.regression_head.bbox_reg, nn.Softplus())

        sides = [round(options.anchor_scale * step) for step in self.strides]
        self.fcos = FCOS(
            _NoBackbone(width),
            num_classes,
            anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((1.0,),) * len(sides)),
            head=head,
            center_sampling_radius=options.center_radius,
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold,
            detections_per_img=options.max_detections,
        )

    def forward(self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None) -> FCOSOutput:
        """Return the raw predictions, and the loss if labels are given.

        Args:
            features: the backbone's maps.
            pixel_values: (B, 3, H, W), of which only the device is read.
            labels: for each image {"boxes": (n, 4) XYXY in pixels of the network's input, "labels": (n,)}.
        """
        fused = self.fuse(features)
        maps = [fused] if self.pyramid is None else self.pyramid(fused)
        raw = {key: value.float() for key, value in self.fcos.head(maps).items()}
        anchors = self._anchors(maps)
        out = FCOSOutput(**raw, anchors=tuple(anchors))
        if labels is not None:
            counts = [len(level) for level in anchors]
            with torch.autocast(pixel_values.device.type, enabled=False):
                losses = self.fcos.compute_loss(labels, raw, [torch.cat(anchors)] * len(labels), counts)
                out.loss = torch.stack(list(losses.values())).sum()
        return out

    def count_labels(self, labels: list[dict[str, Tensor]]) -> int:
        """Return the number of positive locations, by which the loss is divided.

        Args:
            labels: as in `forward`, on the CPU.
        """
        return sum(int((places >= 0).sum()) for places in self.matches(labels))

    @torch.no_grad()
    def matches(self, labels: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return for each image the position of the object that each location belongs to (A,), -1 for none.

        Args:
            labels: as in `forward`.
        """
        H, W = self.image_size
        device = labels[0]["boxes"].device if labels else None
        maps = [torch.empty(1, 1, int(H / step), int(W / step), device=device) for step in self.strides]
        anchors = self._anchors(maps)
        # torchvision matches locations and boxes inside of its loss
        matches = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
        matcher: Any = SimpleNamespace(center_sampling_radius=self.fcos.center_sampling_radius, head=matches)
        counts = [len(level) for level in anchors]
        matched: Any = FCOS.compute_loss(matcher, labels, {}, [torch.cat(anchors)] * len(labels), counts)
        return matched

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return boxes (B, A, 4) XYXY in pixels of the network's input and scores (B, A, K) of all locations."""
        boxes = self.fcos.box_coder.decode(outputs.bbox_regression, torch.cat(list(outputs.anchors)))
        scores = (outputs.cls_logits.sigmoid() * outputs.bbox_ctrness.sigmoid()).sqrt()
        return boxes, scores

    def postprocess(self, outputs: Any) -> list[dict[str, Tensor]]:
        """Return for each image "boxes" (n, 4) XYXY in pixels of the network's input, "scores" (n,) and "labels" (n,).

        The boxes are those that NMS keeps, best first.
        """
        counts = [len(level) for level in outputs.anchors]
        raw = {
            "cls_logits": list(outputs.cls_logits.split(counts, dim=1)),
            "bbox_regression": list(outputs.bbox_regression.split(counts, dim=1)),
            "bbox_ctrness": list(outputs.bbox_ctrness.split(counts, dim=1)),
        }
        batch = len(outputs.cls_logits)
        return self.fcos.postprocess_detections(raw, [list(outputs.anchors)] * batch, [self.image_size] * batch)

    def _anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Return for each level a square anchor around the centre of every cell, (h * w, 4) in input pixels."""
        generator = self.fcos.anchor_generator
        device = maps[0].device
        generator.set_cell_anchors(torch.float32, device)
        anchors = []
        for i, (level, stride) in enumerate(zip(maps, self.strides, strict=True)):
            H, W = level.shape[-2:]
            y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
            centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 4) + 0.5
            anchors.append(centers * stride + generator.cell_anchors[i])
        return anchors


class _NoBackbone(nn.Module):
    """Placeholder from which torchvision's FCOS reads `out_channels`; the backbone runs outside of FCOS."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
