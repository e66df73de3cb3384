"""Feature pyramids on the one resolution of a plain ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALES = (4.0, 2.0, 1.0, 0.5)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of at most 32 groups that divide `channels`; works at batch 1, unlike BatchNorm."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Fuse(nn.Module):
    """All feature maps of the backbone, concatenated and brought to `out_channels` by a 1x1 convolution and a norm."""

    def __init__(self, channels: int, num_levels: int, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels * num_levels, out_channels, 1)
        self.norm = group_norm(out_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.norm(self.project(torch.cat(list(features), dim=1)))  # (B, C, h, w)


class SimpleFeaturePyramid(nn.Module):
    """Simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527, section 3), with GroupNorm.

    Every level is computed from the same map: finer ones by transposed convolutions, coarser ones by max pooling.

    Args:
        channels: channels of the input map.
        out_channels: channels of every level.
        scales: resolution of each level relative to the input map, finest first; powers of two from 1/2 to 4.
    """

    def __init__(self, channels: int, out_channels: int, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        self.levels = nn.ModuleList(self._level(channels, out_channels, scale) for scale in scales)

    @staticmethod
    def _level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
        if scale not in SCALES:
            raise ValueError(f"pyramid scale {scale} is not supported; use some of {', '.join(map(str, SCALES))}")
        layers: list[nn.Module] = []
        width = channels
        if scale < 1:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        while scale > 1:
            layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
            width, scale = width // 2, scale / 2
            if scale > 1:
                layers += [group_norm(width), nn.GELU()]
        layers += [nn.Conv2d(width, out_channels, 1, bias=False), group_norm(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), group_norm(out_channels)]
        return nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> list[Tensor]:
        return [level(feature) for level in self.levels]  # each (B, C, h * scale, w * scale)
