"""Augmentation that torchvision lacks for boxes and label maps: large-scale jitter, and pictures made of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.base import IGNORE, Sample

More = Callable[[], Sample]
"""Gives a further sample of the same dataset, drawn with torch's generator."""

_PARTS = ("image", "boxes", "labels", "iscrowd", "mask")


def put_right(sample: Sample, size: tuple[int, int]) -> None:
    """Cuts boxes at the border and drops those below 1 pixel a side, with their labels, in place.

    The rule of v2.ClampBoundingBoxes and v2.SanitizeBoundingBoxes at a tenth of their time.

    Args:
        sample: with `boxes`, and `labels` and `iscrowd` where it has them.
        size: (H, W) of its image.
    """
    boxes = sample["boxes"].as_subclass(Tensor).clone()  # (n, 4) XYXY
    boxes[:, 0::2].clamp_(0, size[1])
    boxes[:, 1::2].clamp_(0, size[0])
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)  # (n,)
    if not bool(keep.all()):
        boxes = boxes[keep]
        for key in ("labels", "iscrowd"):
            if key in sample:
                sample[key] = sample[key][keep]
    sample["boxes"] = _boxes(boxes, size)


class LargeScaleJitter(v2.Transform):
    """Resizes by a random factor, then crops or pads to `size` at a random place (https://arxiv.org/abs/2012.07177).

    The factor is relative to the plain resize that evaluation uses: at 1 the whole picture fills `size`, at 0.5 it
    covers half of each side and the rest is padded, at 2 half of each of its sides is seen. What is cropped away is
    never computed.

    Args:
        size: (H, W) of the result, in pixels; one number is a square.
        scale: (least, largest) factor, drawn evenly.
        fill: value of uncovered pixels of the image; those of a mask become 255.
    """

    def __init__(self, size: int | Sequence[int], scale: Sequence[float] = (0.5, 2.0), fill: int = 114):
        super().__init__()
        self.size = _sides(size)
        self.scale = _range("scale", scale)
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = next(x.shape[-2:] for x in flat_inputs if isinstance(x, Tensor) and x.ndim >= 3)
        draws = torch.rand(3).tolist()
        scale = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        inner = (height, width) if scale >= 1 else self.size  # what is cropped from, or padded to
        share = 1 / scale if scale >= 1 else scale
        sides = [max(1, round(side * share)) for side in inner]
        first = [int(draw * (side - part + 1)) for draw, side, part in zip(draws[1:], inner, sides, strict=True)]
        return {"crop": scale >= 1, "top": first[0], "left": first[1], "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, height, width = (params[key] for key in ("top", "left", "height", "width"))
        if params["crop"]:  # for masks, torchvision's functions take the nearest pixel
            return F.resized_crop(inpt, top, left, height, width, list(self.size), antialias=True)
        small = F.resize(inpt, [height, width], antialias=True)
        padding = [left, top, self.size[1] - width - left, self.size[0] - height - top]
        return F.pad(small, padding, fill=IGNORE if isinstance(inpt, tv_tensors.Mask) else self.fill)


class Join(v2.Transform):
    """Base of the transforms that take further samples of the dataset: `forward(sample, more)`."""

    def forward(self, sample: Sample, more: More) -> Sample:  # type: ignore[override]
        """Joins a sample with further ones.

        Args:
            sample: `image`, and `boxes`, `labels`, `iscrowd` or `mask`; it is left alone.
            more: gives a further sample as the dataset has it.
        """
        raise NotImplementedError


class Mosaic(Join):
    """Four samples in one picture of twice the height and width (https://arxiv.org/abs/2004.10934).

    Each is resized to `size`; the four meet at a point near the middle. Usually `LargeScaleJitter` follows and shows a
    part of it at the network's size.

    Args:
        size: (H, W) of one of the four, in pixels; one number is a square. The result is (2 H, 2 W).
        p: probability; otherwise the sample passes as it is.
        center: (least, largest) place of the meeting point along each side, in units of `size`, within 0.5..1.5. Two
            equal numbers fix it; at (1, 1) all four are seen whole.
        fill: value of pixels of the image that none of the four covers; those of a mask become 255.
    """

    def __init__(
        self, size: int | Sequence[int], p: float = 1.0, center: Sequence[float] = (0.5, 1.5), fill: int = 114
    ) -> None:
        super().__init__()
        self.size = _sides(size)
        self.p = _probability(p)
        self.center = _range("center", center)
        if not 0.5 <= self.center[0] <= self.center[1] <= 1.5:
            raise ValueError(f"center is {list(center)}; it must lie within 0.5..1.5")
        self.fill = fill

    def forward(self, sample: Sample, more: More) -> Sample:  # type: ignore[override]
        if "boxes" not in sample and "mask" not in sample:
            raise ValueError("Mosaic joins boxes or masks, the sample has neither")
        draws = torch.rand(3).tolist()
        if draws[0] >= self.p:
            return sample
        H, W = self.size
        least, largest = self.center
        y, x = (round(side * (least + d * (largest - least))) for side, d in zip(self.size, draws[1:], strict=True))
        image = torch.full((3, 2 * H, 2 * W), self.fill, dtype=torch.uint8)
        mask = torch.full((2 * H, 2 * W), IGNORE, dtype=torch.uint8) if "mask" in sample else None
        found: list[Sample] = []
        for number, (top, left) in enumerate(((y - H, x - W), (y - H, x), (y, x - W), (y, x))):
            tile = _resized(sample if number == 0 else more(), self.size)
            y0, y1, x0, x1 = max(top, 0), min(top + H, 2 * H), max(left, 0), min(left + W, 2 * W)
            inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
            image[:, y0:y1, x0:x1] = tile["image"][:, *inside].as_subclass(Tensor)
            if mask is not None:
                mask[y0:y1, x0:x1] = tile["mask"][inside].as_subclass(Tensor)
            if "boxes" in tile:
                shifted = tile["boxes"].as_subclass(Tensor) - torch.tensor([x0 - left, y0 - top] * 2)
                tile["boxes"] = _boxes(shifted, (y1 - y0, x1 - x0))
                put_right(tile, (y1 - y0, x1 - x0))  # hidden parts go before the tile gets its place
                tile["boxes"] = tile["boxes"].as_subclass(Tensor) + torch.tensor([x0, y0] * 2)
                found.append(tile)
        out: Sample = {**sample, "image": tv_tensors.Image(image)}
        if mask is not None:
            out["mask"] = tv_tensors.Mask(mask)
        if found:
            out.update(_together(found, (2 * H, 2 * W)))
        return out


class MixUp(Join):
    """The mean of two samples, with the boxes of both (https://arxiv.org/abs/1902.04103).

    The second is flipped or not, resized by a random factor and cropped or padded to the size of the first.

    Args:
        p: probability; otherwise the sample passes as it is.
        scale: (least, largest) factor of the second, as in `LargeScaleJitter`.
        fill: value of pixels of the second that it does not cover.
    """

    def __init__(self, p: float = 1.0, scale: Sequence[float] = (0.5, 1.5), fill: int = 114):
        super().__init__()
        self.p = _probability(p)
        self.scale = _range("scale", scale)
        self.fill = fill

    def forward(self, sample: Sample, more: More) -> Sample:  # type: ignore[override]
        if "boxes" not in sample or "mask" in sample:
            raise ValueError(f"MixUp joins boxes alone, the sample has {', '.join(sample)}")
        if torch.rand(()) >= self.p:
            return sample
        size = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
        second = {key: value for key, value in more().items() if key in _PARTS}
        second = LargeScaleJitter(size, self.scale, self.fill)(v2.RandomHorizontalFlip()(second))
        put_right(second, size)
        # Halves before the sum: it stays uint8, in a fortieth of the time of a float blend.
        one, two = (part["image"].as_subclass(Tensor) >> 1 for part in (sample, second))
        return {**sample, "image": tv_tensors.Image(one.add_(two)), **_together([sample, second], size)}


def _resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """The parts of a sample that move with the pixels, resized to (H, W)."""
    moving = ("image", "boxes", "mask")
    return {
        key: F.resize(sample[key], list(size), antialias=True) if key in moving else sample[key]
        for key in _PARTS
        if key in sample
    }


def _together(samples: Sequence[Sample], size: tuple[int, int]) -> Sample:
    """Boxes, labels and crowd flags of several samples in one; `size` is (H, W) of their common picture."""
    boxes = torch.cat([sample["boxes"].as_subclass(Tensor) for sample in samples])
    out: Sample = {"boxes": _boxes(boxes, size), "labels": torch.cat([sample["labels"] for sample in samples])}
    if "iscrowd" in samples[0]:
        out["iscrowd"] = torch.cat([sample["iscrowd"] for sample in samples])
    return out


def _boxes(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _range(name: str, given: Sequence[float]) -> tuple[float, float]:
    if len(given) != 2 or not 0 < given[0] <= given[1]:
        raise ValueError(f"{name} is {list(given)}; give the least and the largest, both above 0")
    return float(given[0]), float(given[1])


def _probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must lie in 0..1")
    return p
