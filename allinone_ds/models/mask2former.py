"""Mask2Former segmentation head: pixel decoder, transformer decoder and loss of `transformers` on a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
    multi_scale_deformable_attention,
)
from transformers.utils import ModelOutput

from allinone_ds.device_constants import constant, copied_to
from allinone_ds.errors import ConfigError
from allinone_ds.models.class_loss import ClassLoss, ClassLossOptions, ClassWeights
from allinone_ds.models.pyramid import SCALES, Fuse, SimpleFeaturePyramid
from allinone_ds.strict import Strict

_UNKNOWN_LOGIT = -20.0
"""Logit of predicted masks where the truth is unknown. Its sigmoid is zero, and so are its loss and its gradient."""


class Mask2FormerOptions(Strict):
    """Options of the segmentation head `mask2former`; the defaults are those of the paper.

    Example:
        >>> Mask2FormerOptions(width=64, num_queries=20).points
        12544
    """

    width: int = Field(256, ge=32, multiple_of=32)
    """Channels of the pyramid, of both decoders and of the mask embeddings; a multiple of 32 (GroupNorm)."""
    scales: list[float] = Field(list(SCALES), min_length=4, max_length=4)
    """Resolution of the pyramid's four levels relative to the backbone's maps, finest first."""
    num_queries: int = Field(100, ge=1)
    """Masks predicted per image; at least the number of classes that can appear in one image."""
    encoder_layers: int = Field(6, ge=1)
    """Layers of deformable attention in the pixel decoder."""
    decoder_layers: int = Field(10, ge=2)
    """Predictions of the transformer decoder: one per layer, and one before the first layer."""
    attention_heads: int = Field(8, ge=1)
    """Heads of every attention layer."""
    encoder_ffn_dim: int = Field(1024, ge=1)
    """Hidden width of the pixel decoder's feed-forward blocks."""
    ffn_dim: int = Field(2048, ge=1)
    """Hidden width of the transformer decoder's feed-forward blocks."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in both decoders."""
    points: int = Field(12544, ge=1)
    """Points per mask at which matching and losses are computed."""
    no_object_weight: float = Field(0.1, gt=0)
    """Weight of the class "no object" in the classification loss."""
    class_weights: ClassWeights = None
    """Weight of each class in the classification loss, in the order of the classes; "balanced": 1 / (K * frequency) of
    the masks in its training data, one per image and class; None: all 1."""


@dataclass
class Mask2FormerOutput(ModelOutput):
    """Raw predictions of the last layer; Q queries.

    Attributes:
        loss: matched classification, mask and dice losses of all layers, float32.
        class_queries_logits: (B, Q, K + 1) float32, the last class is "no object".
        masks_queries_logits: (B, Q, h, w) float32.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None


class Mask2FormerSegmenter(nn.Module):
    """Mask2Former (https://arxiv.org/abs/2112.01527) for semantic segmentation, on a simple feature pyramid.

    Positions, sampled locations, matching and losses are float32 whatever the dtype of the weights. Pixels of unknown
    class have no influence: at these pixels the predicted masks are replaced by "not part of this mask", as in the
    truth.

    Args:
        num_classes: K.
        channels: channels of the backbone's maps.
        num_levels: number of the backbone's maps.
        options: see `Mask2FormerOptions`.

    Raises:
        ConfigError: the width is no multiple of the number of attention heads.

    Attributes:
        score_name: name of `scores` among the outputs of an ONNX graph.
    """

    score_name = "scores"

    def __init__(self, num_classes: int, channels: int, num_levels: int, options: Mask2FormerOptions) -> None:
        super().__init__()
        width = options.width
        if width % options.attention_heads:
            raise ConfigError(f"mask2former: width {width} is no multiple of attention_heads "
                              f"{options.attention_heads}; change one of them")  # fmt: skip
        self.config = Mask2FormerConfig(
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_layers=options.encoder_layers,
            decoder_layers=options.decoder_layers,
            num_attention_heads=options.attention_heads,
            encoder_feedforward_dim=options.encoder_ffn_dim,
            dim_feedforward=options.ffn_dim,
            dropout=options.dropout,
            num_queries=options.num_queries,
            train_num_points=options.points,
            no_object_weight=options.no_object_weight,
            num_labels=num_classes,  # type: ignore[call-arg]
        )
        self.class_loss = ClassLoss(num_classes, ClassLossOptions(class_weights=options.class_weights))
        self.fuse = Fuse(channels, num_levels, width)
        self.pyramid = SimpleFeaturePyramid(width, width, options.scales)
        self.net = _Decoders(self.config, num_classes)
        self._criteria: dict[torch.device, _Criterion] = {}

    def needs_frequencies(self) -> bool:
        """Return whether `use_frequencies` would change something."""
        return self.class_loss.balanced

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set balanced class weights from the frequencies of the classes among the masks of the training data."""
        self.class_loss.use_frequencies(frequencies)
        self._criteria.clear()

    def forward(self, features: tuple[Tensor, ...], masks: Tensor | None, ignore_index: int) -> ModelOutput:
        """Return the raw predictions, and the loss if label maps are given.

        Args:
            features: the backbone's maps.
            masks: (B, H, W) class ids.
            ignore_index: pixels with this value do not count.
        """
        class_logits, mask_logits = self.net(self.pyramid(self.fuse(features)))
        out = Mask2FormerOutput(class_queries_logits=class_logits[-1], masks_queries_logits=mask_logits[-1])
        if masks is not None:
            with torch.autocast(masks.device.type, enabled=False):
                out.loss = self.loss(class_logits, mask_logits, masks, ignore_index)
        return out

    def loss(self, class_logits: list[Tensor], mask_logits: list[Tensor], masks: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of all layers' predictions in float32; 0, with a gradient, if no pixel of the batch is known.

        Args:
            class_logits: for each layer (B, Q, K + 1).
            mask_logits: for each layer (B, Q, h, w).
            masks: (B, H, W) class ids.
            ignore_index: pixels with this value do not count.
        """
        zero = torch.stack([(value * 0.0).sum() for value in (*class_logits, *mask_logits)]).sum()
        known = masks != ignore_index
        classes_of = _classes_of(masks, known, class_logits[-1].shape[-1] - 1)
        used = [i for i, classes in enumerate(classes_of) if classes]  # images without truth are left out
        if not used:
            return zero
        device = masks.device
        ids = copied_to(torch.tensor([k for classes in classes_of for k in classes]), device)
        class_labels = list(ids.split([len(classes_of[i]) for i in used]))
        if len(used) < len(classes_of):
            rows = copied_to(torch.tensor(used), device)
            masks, known = masks[rows], known[rows]
            class_logits, mask_logits = ([value[rows] for value in values] for values in (class_logits, mask_logits))
        labels = [(m[None] == classes[:, None, None]).float() for m, classes in zip(masks, class_labels, strict=True)]
        unknown = (~known)[:, None].float()
        unknown = F.interpolate(unknown, mask_logits[-1].shape[-2:], mode="area") >= 0.5  # (B, 1, h, w)
        layers = [
            {"class_queries_logits": c, "masks_queries_logits": m.masked_fill(unknown, _UNKNOWN_LOGIT)}
            for c, m in zip(class_logits, mask_logits, strict=True)
        ]
        return zero + self.matched_loss(layers, labels, class_labels)

    def matched_loss(
        self, layers: list[dict[str, Tensor]], mask_labels: list[Tensor], class_labels: list[Tensor]
    ) -> Tensor:
        """Return the loss of all layers' predictions, each matched with the masks of its image.

        Args:
            layers: for each layer {"class_queries_logits": (B, Q, K + 1), "masks_queries_logits": (B, Q, h, w)}.
            mask_labels: for each image float (n, H, W).
            class_labels: for each image (n,).
        """
        weights = {
            "loss_cross_entropy": self.config.class_weight,
            "loss_mask": self.config.mask_weight,
            "loss_dice": self.config.dice_weight,
        }
        # not a part of the model, in which its buffer would be cast to bfloat16
        device = layers[-1]["class_queries_logits"].device
        if device not in self._criteria:
            self._criteria[device] = _Criterion(self.config, weights, self.class_loss.weights).to(device)
        criterion = self._criteria[device]
        parts = criterion(
            **layers[-1], mask_labels=mask_labels, class_labels=class_labels, auxiliary_predictions=layers[:-1]
        )
        total = [value * weight for name, weight in weights.items() for key, value in parts.items() if name in key]
        return torch.stack(total).sum()

    @staticmethod
    def count_labels(masks: Tensor, ignore_index: int) -> int:
        """Return the number of masks in label maps (B, H, W), one per class of an image: the loss is their mean."""
        found = [torch.bincount(image.flatten(), minlength=ignore_index + 1) > 0 for image in masks]
        return sum(int(classes.sum()) - int(classes[ignore_index]) for classes in found)

    @staticmethod
    def scores(outputs: Any) -> Tensor:
        """Return the score of each class at each cell (B, K, h, w): class times mask probability, summed over queries.

        This is the semantic inference of the paper. `transformers` first resizes all masks to 384 x 384.
        """
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, outputs.masks_queries_logits.sigmoid())

    probabilities = scores


def _classes_of(masks: Tensor, known: Tensor, num_classes: int) -> list[list[int]]:
    """Return the classes in each label map, ascending; waits for the device once.

    Args:
        masks: (B, H, W) class ids.
        known: (B, H, W), whether a pixel counts.
        num_classes: K.
    """
    present = torch.zeros(len(masks), num_classes + 1, dtype=torch.bool, device=masks.device)
    ids = torch.where(known, masks, num_classes).long().flatten(1)  # (B, H * W)
    found = present.scatter_(1, ids, True)[:, :num_classes].tolist()
    return [[k for k, is_there in enumerate(row) if is_there] for row in found]


class _Decoders(Mask2FormerPreTrainedModel):
    """Pixel decoder, transformer decoder and classifier: Mask2Former without its backbone."""

    def __init__(self, config: Mask2FormerConfig, num_classes: int) -> None:
        super().__init__(config)
        width = config.feature_size
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=[width] * 4)
        for layer in self.pixel_decoder.encoder.layers:
            layer.self_attn = _Float32DeformableAttention(width, config.num_attention_heads, n_levels=3, n_points=4)
        self.pixel_decoder.position_embedding = _Float32Positions(width // 2, normalize=True)
        self.transformer = Mask2FormerTransformerModule(in_features=width, config=config)
        self.transformer.position_embedder = _Float32Positions(width // 2, normalize=True)
        self.transformer.decoder.layerdrop = 0.0  # ranks would skip different layers and deadlock under ZeRO-3
        self.class_predictor = nn.Linear(width, num_classes + 1)
        self.post_init()

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits of every layer in float32: classes (B, Q, K + 1), masks (B, Q, h, w)."""
        pixels = self.pixel_decoder(levels)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(x.transpose(0, 1)).float() for x in decoded.intermediate_hidden_states]
        return classes, [masks.float() for masks in decoded.masks_queries_logits]


class _Criterion(Mask2FormerLoss):
    """Loss divided by the number of masks in this rank's micro-batch, without a collective, as all losses here.

    The classification loss of an image is the mean over its queries, as in `transformers`. That of a batch is the mean
    over images, each counted as often as it has masks, so that the whole loss has one denominator. With class weights,
    it is divided as without them, so that a mask of weight w counts as w.
    """

    def __init__(
        self, config: Mask2FormerConfig, weights: dict[str, float], of_classes: Sequence[float] | None
    ) -> None:
        super().__init__(config, weights)
        if of_classes is not None:
            self.empty_weight[:-1] = torch.tensor(of_classes)

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Tensor:
        return torch.full((), float(_things(class_labels)), device=device)

    def loss_labels(self, class_queries_logits: Tensor, class_labels: Any, indices: Any) -> dict[str, Tensor]:
        total = class_queries_logits.new_zeros(())
        for logits, classes, matched in zip(class_queries_logits.split(1), class_labels, indices, strict=True):
            mean = super().loss_labels(logits, [classes], (matched,))["loss_cross_entropy"]  # divided by all weights
            others = self.eos_coef * (logits.shape[1] - len(matched[1]))
            sum_of_weights = self.empty_weight[classes[matched[1]]].sum() + others
            total = total + _things([classes]) * mean * sum_of_weights / (len(matched[1]) + others)
        return {"loss_cross_entropy": total / _things(class_labels)}


def _things(class_labels: Sequence[Tensor]) -> int:
    """Return what the loss is the mean of: masks, and images without a mask."""
    return sum(max(len(classes), 1) for classes in class_labels)


class _Float32Positions(Mask2FormerSinePositionEmbedding):
    """Position embedding in float32: bfloat16 cannot represent all cell numbers above 256."""

    def forward(self, shape: Any, device: Any, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        return super().forward(shape, device, torch.float32, mask).to(dtype)


class _Float32DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """Deformable attention that samples in float32: bfloat16 has too few bits for locations on a map."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        position_embeddings: Any = None,
        reference_points: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        B, N, _ = hidden_states.shape
        device, dtype = hidden_states.device, hidden_states.dtype
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        queries = self.with_pos_embed(hidden_states, position_embeddings)
        value = self.value_proj(encoder_hidden_states).view(B, -1, heads, self.d_model // heads)
        offsets = self.sampling_offsets(queries).view(B, N, heads, levels, points, 2)  # in cells of each level
        weights = self.attention_weights(queries).view(B, N, heads, levels * points)
        with torch.autocast(device.type, enabled=False):
            centers = torch.cat([_cell_centers(H, W, device) for H, W in spatial_shapes_list])  # (N, 2)
            cells = constant([(W, H) for H, W in spatial_shapes_list], hidden_states)
            locations = centers[None, :, None, None, None] + offsets.float() / cells[:, None]
            weights = weights.float().softmax(-1).view(B, N, heads, levels, points)
            sampled = multi_scale_deformable_attention(value.float(), spatial_shapes_list, locations, weights)
        return self.output_proj(sampled.to(dtype)), weights


def _cell_centers(H: int, W: int, device: torch.device) -> Tensor:
    """Return x and y of the centre of every cell (H * W, 2), relative to the size of the map."""
    y = (torch.arange(H, device=device, dtype=torch.float32) + 0.5) / H
    x = (torch.arange(W, device=device, dtype=torch.float32) + 0.5) / W
    return torch.stack([x[None].expand(H, W), y[:, None].expand(H, W)], dim=-1).reshape(-1, 2)
