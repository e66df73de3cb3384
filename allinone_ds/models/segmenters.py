"""Segmentation heads: a light upsampling decoder and UPerNet of `transformers`."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetHead

from allinone_ds.models.pyramid import SCALES, ChannelNorm, Fuse, SimpleFeaturePyramid
from allinone_ds.strict import Strict


class LightOptions(Strict):
    """Options of segmentation's head `light`."""

    width: int = Field(128, ge=1)
    """Channels of the decoder."""
    num_convs: int = Field(1, ge=0)
    """3x3 convolutions at the backbone's resolution."""
    upsamples: int = Field(1, ge=0)
    """Steps of doubled resolution, each followed by a 3x3 convolution of half the channels."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of channels dropped before the classifier."""


class LightSegmenter(nn.Module):
    """Fused maps -> convolutions -> bilinear steps of x2 with a convolution each -> 1x1 classifier."""

    def __init__(self, num_classes: int, channels: int, num_levels: int, options: LightOptions) -> None:
        super().__init__()
        width = options.width
        layers: list[nn.Module] = [nn.GELU()]
        for _ in range(options.num_convs):
            layers += _conv(width, width)
        for _ in range(options.upsamples):
            half = max(width // 2, 16)
            layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), *_conv(width, half)]
            width = half
        if options.dropout:
            layers.append(nn.Dropout2d(options.dropout))
        self.fuse = Fuse(channels, num_levels, options.width)
        self.decoder = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _start_uniform(self.classifier)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.classifier(self.decoder(self.fuse(features)))  # (B, K, h * 2^upsamples, w * 2^upsamples)


class UPerNetOptions(Strict):
    """Options of segmentation's head `upernet`."""

    width: int = Field(256, ge=1)
    """Channels of the pyramid and of the head."""
    scales: list[float] = list(SCALES)
    """Resolution of the pyramid's levels relative to the backbone's maps, finest first."""
    pool_scales: list[int] = [1, 2, 3, 6]
    """Side of each grid of the pyramid pooling module, in cells."""


class UPerNetSegmenter(nn.Module):
    """UPerNet (https://arxiv.org/abs/1807.10221) on a simple feature pyramid.

    Its BatchNorms, which fail at batch 1 and on the 1x1 map of the pooling branch, are LayerNorms over channels here.
    GroupNorm works too, but so many in a row wear down what sets one image apart from the next: on four toy images the
    loss stood at 0.12 after 200 steps, with LayerNorm at 0.03.
    """

    def __init__(self, num_classes: int, channels: int, num_levels: int, options: UPerNetOptions) -> None:
        super().__init__()
        width = options.width
        self.fuse = Fuse(channels, num_levels, width)
        self.pyramid = SimpleFeaturePyramid(width, width, options.scales)
        config = UperNetConfig(hidden_size=width, pool_scales=options.pool_scales, num_labels=num_classes)  # type: ignore[call-arg]
        self.head = UperNetHead(config, in_channels=[width] * len(options.scales))
        for module in self.head.modules():
            if isinstance(module, UperNetConvModule):
                module.batch_norm = ChannelNorm(width)  # type: ignore[assignment]
        _start_uniform(self.head.classifier)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.head(self.pyramid(self.fuse(features)))  # (B, K, h * scales[0], w * scales[0])


def segmentation_loss(logits: Tensor, masks: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy over the valid pixels of the batch, in float32 at the resolution of the masks.

    Args:
        logits: (B, K, h, w), any floating dtype.
        masks: (B, H, W) class ids.
        ignore_index: pixels with this value do not count; 0 is returned (with a graph) when no other are there.
    """
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, masks.long(), ignore_index=ignore_index, reduction="sum")
    return total / (masks != ignore_index).sum().clamp(min=1)


def _conv(channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), ChannelNorm(out_channels), nn.GELU()]


def _start_uniform(classifier: nn.Conv2d) -> None:
    """Small weights and no bias: every class starts equally likely."""
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
