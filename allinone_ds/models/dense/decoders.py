"""Decoders that predict C numbers per cell: a light upsampling decoder, and neck and head of DPT of `transformers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

from allinone_ds.models.pyramid import Fuse
from allinone_ds.models.segmenters import upsampling_layers
from allinone_ds.strict import Strict

_REASSEMBLED = (4, 2, 1, 0.5)  # resolutions of DPT's four maps relative to the backbone's


class DenseDecoder(nn.Module, ABC):
    """Base class of the decoders; the weights of the last layer start small, and its bias at 0."""

    @property
    @abstractmethod
    def output(self) -> nn.Conv2d:
        """The last layer, whose bias is what every pixel starts with."""

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return C numbers per cell (B, C, h, w) of the backbone's feature maps."""

    @property
    def untrained(self) -> bool:
        """Whether the bias of the last layer is still 0."""
        return not bool(self._bias.any())

    @property
    def _bias(self) -> Tensor:
        assert self.output.bias is not None
        return self.output.bias

    def initialize_output(self) -> None:
        """Set the weights of the last layer to small values and its bias to 0."""
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self._bias)

    @torch.no_grad()
    def start_with(self, *values: float) -> None:
        """Let the C numbers of every cell start near these."""
        self._bias.copy_(torch.tensor(values))


class LightDecoderOptions(Strict):
    """Options of the head `light` of the kinds with a number per pixel.

    Example:
        >>> LightDecoderOptions(width=64).upsamples
        1
    """

    width: int = Field(128, ge=1)
    """Channels of the decoder."""
    num_convs: int = Field(1, ge=0)
    """3x3 convolutions at the backbone's resolution."""
    upsamples: int = Field(1, ge=0)
    """Doublings of the resolution, each followed by a 3x3 convolution to half the channels."""


class LightDecoder(DenseDecoder):
    """Fused maps -> convolutions -> bilinear x2 upsampling with a convolution each -> 1x1 convolution.

    Args:
        out_channels: C.
        channels: channels of each of the backbone's maps.
        num_levels: number of the backbone's maps.
        options: see `LightDecoderOptions`.
    """

    def __init__(self, out_channels: int, channels: int, num_levels: int, options: LightDecoderOptions) -> None:
        super().__init__()
        layers, width = upsampling_layers(options.width, options.num_convs, options.upsamples)
        self.fuse = Fuse(channels, num_levels, options.width)
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, out_channels, 1)
        self.initialize_output()

    @property
    def output(self) -> nn.Conv2d:
        return self.last

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.last(self.layers(self.fuse(features)))  # (B, C, h * 2^upsamples, w * 2^upsamples)


class DptDecoderOptions(Strict):
    """Options of the head `dpt`.

    Example:
        >>> DptDecoderOptions().neck_widths
        [96, 192, 384, 768]
    """

    width: int = Field(256, ge=2)
    """Channels of the fusion blocks."""
    neck_widths: list[int] = Field([96, 192, 384, 768], min_length=4, max_length=4)
    """Channels of the four maps that are fused, finest first."""


class DptDecoder(DenseDecoder):
    """Neck and head of DPT (https://arxiv.org/abs/2103.13413): four maps of 4, 2, 1 and 1/2 times the backbone's
    resolution, fused from coarse to fine.

    The finest map comes from the first of the backbone's feature maps, the coarsest from the last. DPT's last ReLU is
    left out: the outputs may be negative, and no start can leave it without a gradient.

    Args:
        out_channels: C.
        channels: channels of each of the backbone's maps.
        num_levels: number of the backbone's maps.
        options: see `DptDecoderOptions`.
    """

    def __init__(self, out_channels: int, channels: int, num_levels: int, options: DptDecoderOptions) -> None:
        super().__init__()
        places = torch.linspace(0, num_levels - 1, len(_REASSEMBLED), device="cpu")
        self.levels = [round(place) for place in places.tolist()]
        config = DPTConfig(
            hidden_size=channels,
            neck_hidden_sizes=list(options.neck_widths),
            reassemble_factors=list(_REASSEMBLED),
            fusion_hidden_size=options.width,
            readout_type="ignore",
            is_hybrid=False,
        )
        self.neck = DPTNeck(config)
        self.neck.fusion_stage.layers[0].residual_layer1 = nn.Identity()  # the first one fuses nothing
        head = DPTDepthEstimationHead(config).head
        self.head = nn.Sequential(*head[:-2], nn.Conv2d(head[-2].in_channels, out_channels, 1))  # type: ignore[arg-type]
        self.initialize_output()

    @property
    def output(self) -> nn.Conv2d:
        return self.head[-1]  # type: ignore[return-value]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        h, w = features[0].shape[-2:]
        tokens = [features[level].flatten(2).transpose(1, 2) for level in self.levels]  # (B, N, C)
        tokens = [F.pad(each, (0, 0, 1, 0)) for each in tokens]  # the place of a class token, which is not read
        return self.head(self.neck(tokens, h, w)[-1])  # (B, C, 16 h, 16 w), of an odd h 16 (h + 1)
