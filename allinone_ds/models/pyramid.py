"""Feature pyramids on the single resolution of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from allinone_ds.errors import ConfigError

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Resolutions that a level of the pyramid can have, relative to its input map."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm of at most 32 groups of at least 8 channels each; unlike BatchNorm it works at batch size 1.

    Groups of one channel would make it an instance norm, which removes the strength of a channel in this image: a
    small stem with it could not distinguish green from blue.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))
    return nn.GroupNorm(groups, channels)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of maps (B, C, h, w); works for any batch size and on 1x1 maps."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Fuse(nn.Module):
    """Concatenation of the backbone's feature maps, a 1x1 convolution to `out_channels`, and a norm."""

    def __init__(self, channels: int, num_levels: int, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels * num_levels, out_channels, 1)
        self.norm = ChannelNorm(out_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.norm(self.project(torch.cat(list(features), dim=1)))  # (B, C, h, w)


class SimpleFeaturePyramid(nn.Module):
    """Simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527, section 3), with its LayerNorms.

    Every level is computed from the same map: finer levels by transposed convolutions, coarser ones by max pooling.

    Args:
        channels: channels of the input map.
        out_channels: channels of every level.
        scales: resolution of each level relative to the input map, finest first; each is one of `SCALES`.

    Raises:
        ConfigError: a scale is not one of `SCALES`.
    """

    def __init__(self, channels: int, out_channels: int, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        self.levels = nn.ModuleList(self._level(channels, out_channels, scale) for scale in scales)

    @staticmethod
    def _level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
        if scale not in SCALES:
            raise ConfigError(f"scales: {scale} is no scale of the pyramid; allowed: {', '.join(map(str, SCALES))}")
        layers: list[nn.Module] = []
        width = channels
        if scale < 1:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        while scale > 1:
            layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
            width, scale = width // 2, scale / 2
            if scale > 1:
                layers += [ChannelNorm(width), nn.GELU()]
        layers += [nn.Conv2d(width, out_channels, 1, bias=False), ChannelNorm(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), ChannelNorm(out_channels)]
        return nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> list[Tensor]:
        return [level(feature) for level in self.levels]  # each (B, C, h * scale, w * scale)
