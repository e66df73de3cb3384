"""Transforms of the pixel values alone, which do not change boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class ColorJitter(v2.ColorJitter):
    """v2.ColorJitter with the same options, random numbers and operations, but faster on uint8 images.

    Brightness, contrast and saturation are linear in the colour of a pixel, its grey value and the mean grey value of
    the image, so consecutive ones are applied in one pass. Values are clamped and rounded once, after the last
    operation; torchvision does so after each.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, Tensor) or isinstance(inpt, tv_tensors.BoundingBoxes | tv_tensors.Mask):
            return inpt
        if inpt.dtype != torch.uint8 or inpt.shape[-3:-2] != (3,):
            return super().transform(inpt, params)
        image = inpt.as_subclass(Tensor)
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        pending: list[tuple[str, float]] = []
        for number in params["fn_idx"].tolist():
            factor = params[names[number]]
            if factor is None:
                continue
            if names[number] == "hue_factor":
                image = F.adjust_hue(_apply_linear(image, pending), factor)
                pending = []
            else:
                pending.append((names[number], factor))
        image = _apply_linear(image, pending)
        return tv_tensors.wrap(image, like=inpt) if isinstance(inpt, tv_tensors.Image) else image


def _apply_linear(image: Tensor, operations: Sequence[tuple[str, float]]) -> Tensor:
    """Apply brightness, contrast and saturation in the given order to an image uint8 (3, H, W).

    Every operation maps the form own * x + common * grey(x) + offset to the same form with different coefficients.
    """
    if not operations:
        return image
    flat = image.reshape(3, -1).to(torch.float32)  # (3, H * W)
    grey = _GREY @ flat  # (H * W,)
    own, common, offset = 1.0, 0.0, 0.0
    for name, factor in operations:
        if name == "saturation_factor":  # a blend with each pixel's grey
            own, common = factor * own, factor * common + (1 - factor) * (own + common)
        elif name == "contrast_factor":  # a blend with the mean grey after the operations so far
            mean = (own + common) * float(grey.mean()) + offset
            own, common, offset = factor * own, factor * common, factor * offset + (1 - factor) * mean
        else:
            own, common, offset = factor * own, factor * common, factor * offset
    out = flat.mul_(own).add_(grey, alpha=common).add_(offset)
    return out.clamp_(0, 255).to(torch.uint8).view(image.shape)


_GREY = torch.tensor([0.2989, 0.587, 0.114])


class PixelTransform(v2.Transform):
    """Base of the transforms that change pixel values; a subclass implements `paint`."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, Tensor) or isinstance(inpt, tv_tensors.BoundingBoxes | tv_tensors.Mask):
            return inpt
        painted = self.paint(inpt.as_subclass(Tensor))
        return tv_tensors.Image(painted) if isinstance(inpt, tv_tensors.Image) else painted

    def paint(self, image: Tensor) -> Tensor:
        """Return a new image of the same size, uint8 (3, H, W); random numbers come from torch's generator."""
        raise NotImplementedError


class HSVJitter(PixelTransform):
    """Shifts the hue and scales saturation and value, each by a uniform random amount.

    Args:
        hue: largest shift, as a fraction of the colour circle, 0..0.5.
        saturation: the factor is drawn from 1 - saturation .. 1 + saturation.
        value: the factor is drawn from 1 - value .. 1 + value.
    """

    _PIXELS = 32768  # per pass: a dozen float planes of this size fit in the processor's cache, which halves the time

    def __init__(self, hue: float = 0.03, saturation: float = 0.4, value: float = 0.3):
        super().__init__()
        for name, given, most in (("hue", hue, 0.5), ("saturation", saturation, 1.0), ("value", value, 1.0)):
            if not 0 <= given <= most:
                raise ValueError(f"{name} is {given}; it must lie in 0..{most}")
        self.hue, self.saturation, self.value = hue, saturation, value

    def paint(self, image: Tensor) -> Tensor:
        draws = torch.rand(3).mul_(2).sub_(1)  # -1..1
        shift = 6 * self.hue * float(draws[0])
        return change_hsv(image, shift, 1 + self.saturation * float(draws[1]), 1 + self.value * float(draws[2]))


def change_hsv(image: Tensor, shift: float, saturation: float, value: float) -> Tensor:
    """Shift the hue and scale saturation and value of an image uint8 (3, H, W).

    With value V and chroma C of a pixel, its R, G, B are V - C * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6
    and n = 5, 3, 1 (https://en.wikipedia.org/wiki/HSL_and_HSV, HSV to RGB alternative).

    Args:
        image: uint8 (3, H, W).
        shift: of the hue, in sixths of the colour circle.
        saturation: factor of the saturation.
        value: factor of the value.

    Returns:
        uint8 (3, H, W)
    """
    flat = image.reshape(3, -1)
    out = torch.empty_like(flat)
    for start in range(0, flat.shape[1], HSVJitter._PIXELS):
        part = slice(start, start + HSVJitter._PIXELS)
        red, green, blue = flat[:, part].float()
        most = torch.maximum(torch.maximum(red, green), blue)
        chroma = most - torch.minimum(torch.minimum(red, green), blue)
        inverse = 1 / chroma.clamp(min=1)  # grey pixels have chroma 0 and any hue
        hue = torch.where(
            most == red,
            (green - blue) * inverse,
            torch.where(most == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
        ).add_(shift)
        scaled = (most * value).clamp_(max=255)
        chroma = torch.minimum(chroma * saturation * (scaled / most.clamp(min=1)), scaled)
        for channel, n in enumerate((5, 3, 1)):
            k = torch.remainder(hue + n, 6)
            out[channel, part] = (scaled - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).round_().to(torch.uint8)
    return out.view(image.shape)


class ColorRandAugment(PixelTransform):
    """RandAugment (https://arxiv.org/abs/1909.13719) restricted to its colour operations, which move no pixels.

    Args:
        num_ops: number of operations, each drawn from eight.
        magnitude: largest strength of an operation, 0..1, where 1 is the largest of RandAugment; the strength is drawn
            from 0..magnitude.
    """

    def __init__(self, num_ops: int = 1, magnitude: float = 0.5):
        super().__init__()
        if num_ops < 1 or not 0 <= magnitude <= 1:
            raise ValueError(
                f"num_ops is {num_ops}, it must be at least 1; magnitude is {magnitude}, it must lie in 0..1"
            )
        self.num_ops, self.magnitude = num_ops, magnitude

    def paint(self, image: Tensor) -> Tensor:
        for _ in range(self.num_ops):
            number = int(torch.randint(8, ()))
            strength = self.magnitude * float(torch.rand(()))
            factor = 1 + 0.9 * strength * (1 if torch.rand(()) < 0.5 else -1)
            match number:
                case 0:
                    image = F.adjust_brightness(image, factor)
                case 1:
                    image = F.adjust_saturation(image, factor)
                case 2:
                    image = F.adjust_contrast(image, factor)
                case 3:
                    image = F.adjust_sharpness(image, factor)
                case 4:
                    image = F.posterize(image, 8 - round(4 * strength))
                case 5:
                    image = F.solarize(image, 255 * (1 - strength))
                case 6:
                    image = F.autocontrast(image)
                case 7:
                    image = F.equalize(image)
        return image
