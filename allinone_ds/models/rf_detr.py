"""The detection head RF-DETR: projector, decoder, loss and post-processing of `transformers` on a plain ViT."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import RfDetrConfig, RfDetrForObjectDetection, RfDetrImageProcessor
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import (
    MultiScaleDeformableAttention,
    RfDetrObjectDetectionOutput,
    RfDetrScaleProjector,
)

from allinone_ds.device_constants import constant
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict

_LARGEST_LOGIT = 15.0  # sigmoid(15) is below 1 in float32, so that log(1 - p) in the loss stays finite


class RFDetrOptions(Strict):
    """Options of the detection head `rf_detr`.

    Example:
        >>> RFDetrOptions(num_queries=100).decoder_layers
        3
    """

    width: int = Field(256, ge=8)
    """Channels of the projector and the decoder (`d_model`)."""
    num_queries: int = Field(300, ge=1)
    """Boxes predicted per image; at most the number of the backbone's cells."""
    groups: int = Field(13, ge=1)
    """Groups of queries trained in parallel (Group DETR); one group predicts."""
    decoder_layers: int = Field(3, ge=1)
    """Layers of the decoder."""
    ffn_dim: int = Field(2048, ge=1)
    """Hidden width of the decoder's feed-forward blocks."""
    self_attention_heads: int = Field(8, ge=1)
    """Heads of the decoder's self-attention."""
    cross_attention_heads: int = Field(16, ge=1)
    """Heads of the deformable cross-attention."""
    points: int = Field(4, ge=1)
    """Locations that each head of the deformable attention reads."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the decoder."""
    score_threshold: float = Field(0.01, ge=0, lt=1)
    """Predictions with a lower score are dropped."""
    max_detections: int | None = Field(None, ge=1)
    """Boxes kept per image, at most `num_queries`; None: all. Above 100, it is also the number of boxes per image and
    class that mAP counts."""


class RFDetrDetector(nn.Module):
    """RF-DETR (https://arxiv.org/abs/2511.09554) of `transformers` on the shared backbone.

    RF-DETR's projector receives the concatenated maps of the backbone. Boxes are refined, sampled and matched in
    float32 whatever the dtype of the weights.

    Args:
        num_classes: K.
        channels: channels of each of the backbone's maps.
        stride: pixels per cell of the backbone's maps.
        num_levels: number of the backbone's maps.
        image_size: (H, W) of the network's input in pixels.
        options: see `RFDetrOptions`.

    Raises:
        ConfigError: more queries than cells, more boxes than queries, or a width that the numbers of attention heads do
            not divide.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        stride: int,
        num_levels: int,
        image_size: tuple[int, int],
        options: RFDetrOptions,
    ) -> None:
        super().__init__()
        cells = (image_size[0] // stride) * (image_size[1] // stride)
        if options.num_queries > cells:
            raise ConfigError(
                f"rf_detr: num_queries = {options.num_queries}, but images of {image_size[0]} x {image_size[1]} pixels "
                f"have {cells} cells of {stride} x {stride} pixels; use at most {cells} queries"
            )
        for name in ("self_attention_heads", "cross_attention_heads"):
            if options.width % getattr(options, name):
                raise ConfigError(f"rf_detr: width {options.width} is no multiple of {name} {getattr(options, name)}; "
                                  "change one of them")  # fmt: skip
        self.score_threshold = options.score_threshold
        self.num_queries = options.num_queries
        self.max_detections = options.max_detections or options.num_queries
        if self.max_detections > self.num_queries:
            raise ConfigError(f"rf_detr: max_detections = {self.max_detections}, but there are {self.num_queries} "
                              "queries, which predict one box each; raise num_queries")  # fmt: skip
        self.image_size = image_size
        config = RfDetrConfig(
            backbone_config=_neck_shape(8, 1),  # replaced below
            d_model=options.width,
            num_queries=options.num_queries,
            group_detr=options.groups,
            decoder_layers=options.decoder_layers,
            decoder_ffn_dim=options.ffn_dim,
            decoder_self_attention_heads=options.self_attention_heads,
            decoder_cross_attention_heads=options.cross_attention_heads,
            decoder_n_points=options.points,
            dropout=options.dropout,
            num_labels=num_classes,  # type: ignore[call-arg]
        )
        self.net = RfDetrForObjectDetection(config)
        neck_config = copy.deepcopy(config)
        neck_config.backbone_config = _neck_shape(channels, num_levels)
        neck = _Neck(neck_config)
        neck.apply(self.net._init_weights)
        self.net.model.backbone = neck
        for module in self.net.modules():
            if isinstance(getattr(module, "attn", None), MultiScaleDeformableAttention):
                module.attn = _Float32DeformableAttention()

    def forward(
        self, features: tuple[Tensor, ...], pixel_values: Tensor, labels: Any = None
    ) -> RfDetrObjectDetectionOutput:
        """Return the raw predictions, and the loss if labels are given.

        Args:
            features: the backbone's maps.
            pixel_values: (B, 3, H, W), of which only the device and the size are read.
            labels: for each image {"boxes": (n, 4) XYXY in pixels of the network's input, "labels": (n,)}.
        """
        net = self.net
        hidden = net.model(torch.cat(features, dim=1))
        references = hidden.intermediate_reference_points.float()  # (layers, B, Q, 4) or (1, B, Q, 4)
        logits, boxes = net.predict_class_and_boxes(hidden.intermediate_hidden_states, references)
        logits, boxes = logits.float(), boxes.float()
        out = RfDetrObjectDetectionOutput(logits=logits[-1], pred_boxes=boxes[-1])
        if labels is not None:
            enc_logits = net.predict_encoder_class_logits(hidden.enc_outputs_class).float()
            enc_boxes = hidden.enc_outputs_coord_logits.float()
            with torch.autocast(pixel_values.device.type, enabled=False):
                out.loss = self._loss(logits, boxes, enc_logits, enc_boxes, _targets(labels, pixel_values))
        return out

    def _loss(
        self,
        logits: Tensor,
        boxes: Tensor,
        enc_logits: Tensor,
        enc_boxes: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        raw = (logits, boxes, enc_logits, enc_boxes)
        # The matcher raises for non-finite boxes: it gets finite ones, and the last line makes the loss non-finite.
        logits, boxes, enc_logits, enc_boxes = (value.nan_to_num(0.0, 1e4, -1e4) for value in raw)
        logits, enc_logits = (x.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) for x in (logits, enc_logits))
        layers = [*zip(logits, boxes, strict=True), (enc_logits, enc_boxes)]
        # in evaluation the decoder predicts with a single group, so the loss has one as well
        criterion = _Criterion(self.net.config, self.net.config.group_detr if self.training else 1)
        loss = torch.stack([criterion.of_layer(*layer, targets) for layer in layers]).sum()
        return loss + sum((value * 0.0).sum() for value in raw)

    @staticmethod
    def count_labels(labels: list[dict[str, Tensor]]) -> int:
        """Return the number of boxes, by which the loss of a group of queries is divided."""
        return sum(len(target["boxes"]) for target in labels)

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return boxes (B, Q, 4) XYXY in pixels of the network's input and scores (B, Q, K) of all queries."""
        limit = constant([self.image_size[1], self.image_size[0]] * 2, outputs.pred_boxes)
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * limit
        return boxes.clamp(min=0).minimum(limit), outputs.logits.sigmoid()

    def postprocess(self, outputs: Any) -> list[dict[str, Tensor]]:
        """Return for each image "boxes" (n, 4) XYXY in pixels of the network's input, "scores" (n,) and "labels" (n,).

        The boxes are sorted, best first.
        """
        predictions = RfDetrImageProcessor().post_process_object_detection(
            outputs,
            threshold=self.score_threshold,
            target_sizes=[self.image_size] * len(outputs.logits),
            top_k=self.max_detections,
        )
        limit = constant([self.image_size[1], self.image_size[0]] * 2, outputs.logits)
        for prediction in predictions:
            prediction["boxes"] = prediction["boxes"].clamp(min=0).minimum(limit)
        return predictions


class _Criterion(LwDetrImageLoss):
    """Loss divided by the number of boxes in this rank's micro-batch, without a collective, as all losses here."""

    def __init__(self, config: RfDetrConfig, groups: int) -> None:
        matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        super().__init__(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"], groups)
        self.weights = {
            "loss_ce": config.class_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }

    def of_layer(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Match one layer's predictions and return the weighted sum of classification, box and GIoU losses."""
        outputs = {"logits": logits, "pred_boxes": boxes}
        indices = self.matcher(outputs, targets, self.group_detr)
        count = self.group_detr * max(RFDetrDetector.count_labels(targets), 1)
        losses = self.loss_labels(outputs, targets, indices, count) | self.loss_boxes(outputs, targets, indices, count)
        return torch.stack([value * self.weights[name] for name, value in losses.items()]).sum()


class _Neck(nn.Module):
    """Replacement of RF-DETR's backbone that receives the concatenated feature maps instead of pixels."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        self.projector = RfDetrScaleProjector(config)

    def forward(self, maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector((maps,)), mask.bool()


class _Float32DeformableAttention(MultiScaleDeformableAttention):
    """Deformable attention that samples in float32.

    bfloat16 has too few bits for locations on a map, and CUDA kernels refuse mixed dtypes.
    """

    def forward(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = value.dtype
        args = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        with torch.autocast(value.device.type, enabled=False):
            return super().forward(value.float(), *args, **kwargs).to(dtype)


def _neck_shape(channels: int, num_levels: int) -> RfDetrDinov2Config:
    """Return a backbone configuration from which RF-DETR reads the number of channels and maps only."""
    return RfDetrDinov2Config(
        hidden_size=channels,
        num_hidden_layers=num_levels,
        num_attention_heads=1,
        image_size=14,
        out_indices=list(range(1, num_levels + 1)),  # type: ignore[call-arg]
    )


def _targets(labels: list[dict[str, Tensor]], pixel_values: Tensor) -> list[dict[str, Tensor]]:
    """Return the targets in the form of RF-DETR's loss: centre and size of each box, relative to the image."""
    H, W = pixel_values.shape[-2:]
    targets = []
    for target in labels:
        x0, y0, x1, y1 = target["boxes"].unbind(-1)
        boxes = torch.stack([(x0 + x1) / 2 / W, (y0 + y1) / 2 / H, (x1 - x0) / W, (y1 - y0) / H], dim=-1)
        targets.append({"class_labels": target["labels"], "boxes": boxes})
    return targets
