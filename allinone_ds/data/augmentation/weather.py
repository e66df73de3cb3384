"""Rain, frost, fog and spatter, drawn from random fields so that the package needs no textures.

They imitate the corruptions of ImageNet-C (https://arxiv.org/abs/1903.12261); for its brightness use `ColorJitter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from allinone_ds.data.augmentation.colour import PixelTransform

_GRID = 256  # longer side of a random field in pixels, before it is resized to the image


class Weather(PixelTransform):
    """Base of the weather transforms.

    Args:
        severity: (least, largest) of a uniform draw; 0 is hardly visible, 1 is the strongest.
    """

    def __init__(self, severity: Sequence[float] = (0.2, 0.6)):
        super().__init__()
        if len(severity) != 2 or not 0 <= severity[0] <= severity[1] <= 1:
            raise ValueError(f"severity is {severity}; give (least, largest), both within 0..1")
        self.severity = (float(severity[0]), float(severity[1]))

    def paint(self, image: Tensor) -> Tensor:
        least, largest = self.severity
        return self.weather(image, least + float(torch.rand(())) * (largest - least))

    def weather(self, image: Tensor, severity: float) -> Tensor:
        """Return an image uint8 (3, H, W) with weather of a severity in 0..1."""
        raise NotImplementedError


class Fog(Weather):
    """Whitens the image with a smoothly varying density."""

    def weather(self, image: Tensor, severity: float) -> Tensor:
        density = clouds(image.shape[-2:], coarsest=2).mul_(0.6).add_(0.4)
        return blend(image, (225.0, 228.0, 232.0), density.mul_(0.3 + 0.6 * severity))


class Frost(Weather):
    """Branching, bluish white ice that covers the border more than the centre."""

    def weather(self, image: Tensor, severity: float) -> Tensor:
        size = image.shape[-2:]
        ridges = (
            (clouds(size, coarsest=5) - 0.5).abs_().mul_(-5).add_(1).clamp_(0, 1)
        )  # thin lines where the field crosses 0.5
        grain = clouds(size, coarsest=32)
        height, width = size
        y = torch.linspace(-1, 1, height).abs_().view(-1, 1)
        x = torch.linspace(-1, 1, width).abs_().view(1, -1)
        border = torch.maximum(y, x)  # 0 in the centre, 1 at the border
        ice = (ridges * 0.7 + grain * 0.5) * (border + severity - 0.5).clamp_(0, 1).mul_(1.2)
        return blend(image, (214.0, 228.0, 240.0), ice.clamp_(0, 0.9))


class Rain(Weather):
    """Streaks of one direction on a slightly darkened image."""

    def weather(self, image: Tensor, severity: float) -> Tensor:
        height, width = image.shape[-2:]
        side = min(height, width)
        count = round(60 + 500 * severity)
        slant = (float(torch.rand(())) - 0.5) * 0.7  # horizontal per vertical pixel
        streak_draws = torch.rand(count, 4).tolist()
        layer = Image.new("L", (width, height))
        draw = ImageDraw.Draw(layer)
        for left, top, long, bright in streak_draws:
            length = side * (0.03 + 0.09 * long)
            x, y = left * 1.4 * width - 0.2 * width, top * 1.2 * height - 0.2 * height
            end = (x + slant * length, y + length)
            draw.line([(x, y), end], fill=round(90 + 140 * bright), width=1 + (side >= 512) * round(bright * 2))
        streaks = torch.from_numpy(np.array(layer.filter(ImageFilter.BoxBlur(max(0.4, side / 1500))))) / 255
        dark = blend(image, (60.0, 64.0, 70.0), torch.tensor(0.1 + 0.2 * severity))
        return blend(dark, (215.0, 218.0, 222.0), streaks.mul_(0.75))


class Spatter(Weather):
    """Drops of mud or water on the lens."""

    def weather(self, image: Tensor, severity: float) -> Tensor:
        field = clouds(image.shape[-2:], coarsest=12, finest=48)
        covered = 0.04 + 0.16 * severity  # fraction of the image
        level = float(torch.quantile(field[::4, ::4].flatten(), 1 - covered))
        drops = (field - level).mul_(12).clamp_(0, 1)
        if torch.rand(()) < 0.5:
            return blend(image, (72.0, 54.0, 36.0), drops.mul_(0.95))
        rim = (drops * (1 - drops)).mul_(4)  # bright at the edge, translucent inside
        return blend(image, (226.0, 234.0, 240.0), (drops * 0.35 + rim * 0.4).clamp_(0, 0.9))


def clouds(size: Sequence[int], coarsest: int, finest: int = _GRID // 2) -> Tensor:
    """Return a random field (H, W) in 0..1: a sum of noise at scales that halve in cell size and in weight.

    Args:
        size: (H, W) in pixels.
        coarsest: number of cells of the coarsest scale along the longer side.
        finest: largest number of cells of the finest scale along the longer side.
    """
    height, width = int(size[0]), int(size[1])
    shrink = min(1.0, _GRID / max(height, width))
    grid = (max(2, math.ceil(height * shrink)), max(2, math.ceil(width * shrink)))
    field = torch.zeros(1, 1, *grid)
    cells, weight = float(coarsest), 1.0
    while cells <= finest:
        per_pixel = cells / max(height, width)
        noise = torch.rand(1, 1, max(2, math.ceil(height * per_pixel)), max(2, math.ceil(width * per_pixel)))
        field += weight * F.interpolate(noise, grid, mode="bicubic", align_corners=True)
        cells, weight = cells * 2, weight / 2
    field -= field.min()
    field /= field.max().clamp(min=1e-6)
    return F.interpolate(field, (height, width), mode="bilinear", align_corners=True)[0, 0]


def blend(image: Tensor, color: tuple[float, float, float], weight: Tensor) -> Tensor:
    """Blend a colour into an image.

    Args:
        image: uint8 (3, H, W).
        color: R, G, B, 0..255.
        weight: weight of the colour, 0..1, (H, W) or a single number.

    Returns:
        uint8 (3, H, W)
    """
    target = torch.tensor(color).view(3, 1, 1)
    return torch.lerp(image.float(), target, weight).round_().clamp_(0, 255).to(torch.uint8)
