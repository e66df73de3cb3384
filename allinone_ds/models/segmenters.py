"""Segmentation heads that predict logits per cell: a light upsampling decoder, and UPerNet of `transformers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetHead
from transformers.utils import ModelOutput

from allinone_ds.models.class_loss import ClassLoss, ClassLossOptions, set_prior
from allinone_ds.models.pyramid import SCALES, ChannelNorm, Fuse, SimpleFeaturePyramid


@dataclass
class SegmentationOutput(ModelOutput):
    """Raw predictions.

    Attributes:
        loss: mean loss over the valid pixels of the micro-batch, float32.
        logits: (B, K, h, w) at the head's resolution.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class LogitOptions(ClassLossOptions):
    """Options that the segmentation heads with logits per cell share.

    Example:
        >>> LogitOptions(prior="uniform").focal_gamma
        0.0
    """

    prior: Literal["data", "uniform"] = "data"
    """Initial probability of the classes: "data": their frequency in the training data; "uniform": all equal."""


class LogitSegmenter(nn.Module, ABC):
    """Base class of segmenters that predict class logits per cell.

    Args:
        num_classes: K.
        options: see `LogitOptions`.

    Attributes:
        score_name: name of `scores` among the outputs of an ONNX graph.
    """

    score_name = "logits"

    def __init__(self, num_classes: int, options: LogitOptions) -> None:
        super().__init__()
        self.prior = options.prior
        self.loss = ClassLoss(num_classes, options)

    @property
    @abstractmethod
    def output(self) -> nn.Conv2d:
        """The last layer, whose bias is the prior of the classes."""

    def needs_frequencies(self) -> bool:
        """Return whether `use_frequencies` would change something."""
        bias = self.output.bias
        return self.loss.balanced or (self.prior == "data" and bias is not None and not bias.any())

    def use_frequencies(self, frequencies: Sequence[float]) -> None:
        """Set prior and balanced class weights from the frequencies of the classes in the training data."""
        self.loss.use_frequencies(frequencies)
        if self.prior == "data":
            set_prior(self.output.bias, frequencies, self.loss.weights)

    @abstractmethod
    def logits(self, features: tuple[Tensor, ...]) -> Tensor:
        """Return the class logits (B, K, h, w) of the backbone's feature maps."""

    def forward(self, features: tuple[Tensor, ...], masks: Tensor | None, ignore_index: int) -> SegmentationOutput:
        """Return the logits, and the loss if label maps are given.

        Args:
            features: the backbone's maps.
            masks: (B, H, W) class ids.
            ignore_index: pixels with this value do not count.
        """
        logits = self.logits(features)
        out = SegmentationOutput(logits=logits)
        if masks is not None:
            with torch.autocast(masks.device.type, enabled=False):
                out.loss = segmentation_loss(logits, masks, ignore_index, self.loss, self.training)
        return out

    @staticmethod
    def count_labels(masks: Tensor, ignore_index: int) -> int:
        """Return the number of pixels of label maps (B, H, W) that the loss is the mean of."""
        return int(torch.count_nonzero(masks != ignore_index))  # five times as fast as a sum of booleans

    @staticmethod
    def scores(outputs: Any) -> Tensor:
        """Return scores (B, K, h, w), the largest of which is the predicted class."""
        return outputs.logits

    @staticmethod
    def probabilities(outputs: Any) -> Tensor:
        """Return scores (B, K, h, w) that may be averaged over views."""
        return outputs.logits.float().softmax(1)


class LightOptions(LogitOptions):
    """Options of the segmentation head `light`.

    Example:
        >>> LightOptions(width=64, upsamples=2).num_convs
        1
    """

    width: int = Field(128, ge=1)
    """Channels of the decoder."""
    num_convs: int = Field(1, ge=0)
    """3x3 convolutions at the backbone's resolution."""
    upsamples: int = Field(1, ge=0)
    """Doublings of the resolution, each followed by a 3x3 convolution to half the channels."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a channel before the classifier in training."""


class LightSegmenter(LogitSegmenter):
    """Fused maps -> convolutions -> bilinear x2 upsampling with a convolution each -> 1x1 classifier.

    Args:
        num_classes: K.
        channels: channels of each of the backbone's maps.
        num_levels: number of the backbone's maps.
        options: see `LightOptions`.
    """

    def __init__(self, num_classes: int, channels: int, num_levels: int, options: LightOptions) -> None:
        super().__init__(num_classes, options)
        layers, width = upsampling_layers(options.width, options.num_convs, options.upsamples)
        if options.dropout:
            layers.append(nn.Dropout2d(options.dropout))
        self.fuse = Fuse(channels, num_levels, options.width)
        self.decoder = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _initialize_uniform(self.classifier)

    @property
    def output(self) -> nn.Conv2d:
        return self.classifier

    def logits(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.classifier(self.decoder(self.fuse(features)))  # (B, K, h * 2^upsamples, w * 2^upsamples)


class UPerNetOptions(LogitOptions):
    """Options of the segmentation head `upernet`.

    Example:
        >>> UPerNetOptions(width=64).pool_scales
        [1, 2, 3, 6]
    """

    width: int = Field(256, ge=1)
    """Channels of the pyramid and of the head."""
    scales: list[float] = list(SCALES)
    """Resolution of the pyramid's levels relative to the backbone's maps, finest first."""
    pool_scales: list[int] = [1, 2, 3, 6]
    """Side of each grid of the pyramid pooling module in cells."""


class UPerNetSegmenter(LogitSegmenter):
    """UPerNet (https://arxiv.org/abs/1807.10221) on a simple feature pyramid.

    UPerNet's BatchNorms fail at batch size 1 and on the 1x1 map of the pooling branch; LayerNorms over channels
    replace them. GroupNorm also works, but so many in a row reduce the differences between images: on four toy images
    the loss was 0.12 after 200 steps, and 0.03 with LayerNorm.

    Args:
        num_classes: K.
        channels: channels of each of the backbone's maps.
        num_levels: number of the backbone's maps.
        options: see `UPerNetOptions`.
    """

    def __init__(self, num_classes: int, channels: int, num_levels: int, options: UPerNetOptions) -> None:
        super().__init__(num_classes, options)
        width = options.width
        self.fuse = Fuse(channels, num_levels, width)
        self.pyramid = SimpleFeaturePyramid(width, width, options.scales)
        config = UperNetConfig(hidden_size=width, pool_scales=options.pool_scales, num_labels=num_classes)  # type: ignore[call-arg]
        self.head = UperNetHead(config, in_channels=[width] * len(options.scales))
        for module in self.head.modules():
            if isinstance(module, UperNetConvModule):
                module.batch_norm = ChannelNorm(width)  # type: ignore[assignment]
        _initialize_uniform(self.head.classifier)

    @property
    def output(self) -> nn.Conv2d:
        return self.head.classifier

    def logits(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.head(self.pyramid(self.fuse(features)))  # (B, K, h * scales[0], w * scales[0])


def segmentation_loss(
    logits: Tensor, masks: Tensor, ignore_index: int, loss: ClassLoss | None = None, training: bool = True
) -> Tensor:
    """Return the mean loss over the valid pixels of the batch, in float32 at the resolution of the masks.

    Args:
        logits: (B, K, h, w), any floating dtype.
        masks: (B, H, W) class ids.
        ignore_index: pixels with this value do not count; without any other pixel the result is 0, with a gradient.
        loss: loss of a pixel; None: cross-entropy.
        training: whether labels are smoothed.
    """
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    loss = loss or ClassLoss(logits.shape[1], ClassLossOptions())  # type: ignore[call-arg]
    total = loss(logits, masks.long(), training, ignore_index)
    return total / (masks != ignore_index).sum().clamp(min=1)


def upsampling_layers(width: int, num_convs: int, upsamples: int) -> tuple[list[nn.Module], int]:
    """Return the layers of a light decoder after `Fuse`, and the channels of their output.

    Args:
        width: channels of the input.
        num_convs: 3x3 convolutions at the resolution of the input.
        upsamples: doublings of the resolution, each followed by a 3x3 convolution to half the channels, at least 16.
    """
    layers: list[nn.Module] = [nn.GELU()]
    for _ in range(num_convs):
        layers += _conv(width, width)
    for _ in range(upsamples):
        half = max(width // 2, 16)
        layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), *_conv(width, half)]
        width = half
    return layers, width


def _conv(channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), ChannelNorm(out_channels), nn.GELU()]


def _initialize_uniform(classifier: nn.Conv2d) -> None:
    """Set small weights and no bias, so that all classes start equally likely."""
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
