"""Pictures of numbers per pixel: colour maps with a bar that says what the colours mean, normals and black on white."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from allinone_ds.tasks.drawing import FONT, FONT_SIZE, enlarge

NO_VALUE = (110, 110, 110)
"""Colour of the pixels without a value."""
_COLOURS = "magma_r"  # light is near, dark is far


def value_range(*maps: Tensor | None) -> tuple[float, float]:
    """Return the 1st and 99th percentile of the numbers in several maps, for their colours; (0, 1) without a number."""
    known = [each.flatten()[each.flatten().isfinite()] for each in maps if each is not None]
    numbers = torch.cat([each.float().cpu() for each in known]).numpy()
    if not numbers.size:
        return 0.0, 1.0
    low, high = np.percentile(numbers, [1, 99]).tolist()
    return (low, high) if high > low else (low, low + 1e-3 + abs(low) * 1e-3)


def coloured(values: Tensor, low: float, high: float) -> Tensor:
    """Return numbers (H, W) as colours uint8 (3, H, W), light for `low` and dark for `high`; grey without a value."""
    fraction = ((values.float().cpu() - low) / (high - low)).clamp(0, 1)
    colours = matplotlib.colormaps[_COLOURS](fraction.nan_to_num(0).numpy(), bytes=True)[..., :3]
    return _without_value(torch.from_numpy(colours.copy()).permute(2, 0, 1), values.isnan().cpu())


def normal_colours(normals: Tensor) -> Tensor:
    """Return normals (3, H, W) in the usual colours uint8 (3, H, W); grey without a value.

    Red grows to the right, green upwards and blue towards the viewer.
    """
    upwards = normals.float().cpu() * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    colours = ((upwards.nan_to_num(0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return _without_value(colours, normals.isnan().any(0).cpu())


def ink(values: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Return numbers 0..1 (H, W) as uint8 (3, H, W), black for 1 on white; grey where `ignored` (H, W)."""
    dark = ((1 - values.float().cpu().clamp(0, 1)) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return dark if ignored is None else _without_value(dark, ignored.cpu())


def with_bar(picture: Tensor, low: float, high: float) -> Tensor:
    """Return a picture with the colours from `low` to `high` and their numbers in a strip below it."""
    width = picture.shape[-1]
    font = ImageFont.truetype(FONT, FONT_SIZE)
    left, right = number_text(low), number_text(high)
    height = FONT_SIZE + 8
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    start, end = int(font.getlength(left)) + 10, width - int(font.getlength(right)) - 10
    draw.text((4, 3), left, fill="black", font=font)
    draw.text((end + 6, 3), right, fill="black", font=font)
    if end > start:
        ramp = torch.linspace(low, high, end - start).expand(FONT_SIZE, -1)
        strip.paste(Image.fromarray(coloured(ramp, low, high).permute(1, 2, 0).numpy()), (start, 4))
    return torch.cat([picture, pil_to_tensor(strip)], dim=-2)


def large(picture: Tensor) -> Tensor:
    """Return a picture enlarged as all drawings are, and a plain uint8 tensor."""
    return enlarge(picture.cpu())[0]


def number_text(value: float) -> str:
    """Return a number with three significant digits.

    Example:
        >>> number_text(0.01234), number_text(12.345), number_text(1234.5)
        ('0.0123', '12.3', '1234')
    """
    if not value or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _without_value(colours: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing, torch.tensor(NO_VALUE, dtype=torch.uint8).view(3, 1, 1), colours)
