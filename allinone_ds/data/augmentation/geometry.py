"""Large-scale jitter, Mosaic and MixUp, which move boxes and masks with the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.augmentation.objects import OF_OBJECTS, sanitize_objects, select
from allinone_ds.data.base import IGNORE, Sample
from allinone_ds.data.dense_maps import empty_value

DrawSample = Callable[[], Sample]
"""Returns a further sample of the same dataset, drawn with torch's generator."""

_PARTS = ("image", "boxes", "labels", "iscrowd", "mask")


def sanitize_boxes(sample: Sample, size: tuple[int, int]) -> None:
    """Cut boxes at the border and drop those with a side below 1 pixel, with all that belongs to them, in place.

    Equal to v2.ClampBoundingBoxes and v2.SanitizeBoundingBoxes, but ten times as fast. Keypoints and masks are put
    right by `sanitize_objects`.

    Args:
        sample: has `boxes`, and may have other keys of `OF_OBJECTS`.
        size: (H, W) of its image.
    """
    boxes = sample["boxes"].as_subclass(Tensor).clone()  # (n, 4) XYXY
    boxes[:, 0::2].clamp_(0, size[1])
    boxes[:, 1::2].clamp_(0, size[0])
    boxes, keep = sanitize_objects(sample, boxes, size)
    keep &= ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)  # (n,)
    if not bool(keep.all()):
        boxes = boxes[keep]
        for key in OF_OBJECTS:
            if key in sample:
                sample[key] = select(sample[key], keep)
    sample["boxes"] = _boxes(boxes, size)


class LargeScaleJitter(v2.Transform):
    """Resizes by a random factor, then crops or pads to `size` at a random position (https://arxiv.org/abs/2012.07177).

    The factor is relative to the plain resize of evaluation. At 1 the image fills `size`; at 0.5 it covers half of
    each side and the rest is padded; at 2 half of its height and width is visible. Only the visible part is resized.

    Args:
        size: (H, W) of the result in pixels; one number is a square.
        scale: (least, largest) factor of a uniform draw.
        fill: value of the pixels that the image does not cover; those of a mask become 255, those of a depth NaN.
    """

    def __init__(self, size: int | Sequence[int], scale: Sequence[float] = (0.5, 2.0), fill: int = 114):
        super().__init__()
        self.size = _height_and_width(size)
        self.scale = _validate_range("scale", scale)
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = next(x.shape[-2:] for x in flat_inputs if isinstance(x, Tensor) and x.ndim >= 3)
        draws = torch.rand(3).tolist()
        scale = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        inner = (height, width) if scale >= 1 else self.size  # what is cropped from, or padded to
        fraction = 1 / scale if scale >= 1 else scale
        sides = [max(1, round(side * fraction)) for side in inner]
        first = [int(draw * (side - part + 1)) for draw, side, part in zip(draws[1:], inner, sides, strict=True)]
        return {"crop": scale >= 1, "top": first[0], "left": first[1], "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, height, width = (params[key] for key in ("top", "left", "height", "width"))
        if params["crop"]:  # torchvision resizes masks to the nearest pixel
            return F.resized_crop(inpt, top, left, height, width, list(self.size), antialias=True)
        small = F.resize(inpt, [height, width], antialias=True)
        padding = [left, top, self.size[1] - width - left, self.size[0] - height - top]
        return F.pad(small, padding, fill=empty_value(inpt, self.fill))


class MultiSampleTransform(v2.Transform):
    """Base of the transforms that combine a sample with further samples of the dataset."""

    def forward(self, sample: Sample, further: DrawSample) -> Sample:  # type: ignore[override]
        """Return a sample combined with further ones.

        Args:
            sample: `image`, and `boxes`, `labels`, `iscrowd` or `mask`; it is not modified.
            further: returns a further sample as the dataset gives it.
        """
        raise NotImplementedError


class Mosaic(MultiSampleTransform):
    """Combines four samples in one image of twice the height and width (https://arxiv.org/abs/2004.10934).

    Each sample is resized to `size`; their corners meet at a random point near the centre. Usually `LargeScaleJitter`
    follows, which reduces the result to the model's image size.

    Args:
        size: (H, W) of each of the four samples in pixels; one number is a square. The result is (2 H, 2 W).
        p: probability; otherwise the sample does not change.
        center: (least, largest) coordinate of the point where the samples meet, in units of `size`, within 0.5..1.5;
            at (1, 1) all four samples are completely visible.
        fill: value of the pixels that no sample covers; those of a mask become 255.
    """

    def __init__(
        self, size: int | Sequence[int], p: float = 1.0, center: Sequence[float] = (0.5, 1.5), fill: int = 114
    ) -> None:
        super().__init__()
        self.size = _height_and_width(size)
        self.p = _validate_probability(p)
        self.center = _validate_range("center", center)
        if not 0.5 <= self.center[0] <= self.center[1] <= 1.5:
            raise ValueError(f"center is {list(center)}; it must lie within 0.5..1.5")
        self.fill = fill

    def forward(self, sample: Sample, further: DrawSample) -> Sample:  # type: ignore[override]
        if "boxes" not in sample and "mask" not in sample:
            raise ValueError("Mosaic combines boxes or masks, the sample has neither")
        draws = torch.rand(3).tolist()
        if draws[0] >= self.p:
            return sample
        H, W = self.size
        least, largest = self.center
        y, x = (round(side * (least + d * (largest - least))) for side, d in zip(self.size, draws[1:], strict=True))
        image = torch.full((3, 2 * H, 2 * W), self.fill, dtype=torch.uint8)
        mask = torch.full((2 * H, 2 * W), IGNORE, dtype=torch.uint8) if "mask" in sample else None
        tiles: list[Sample] = []
        for number, (top, left) in enumerate(((y - H, x - W), (y - H, x), (y, x - W), (y, x))):
            tile = _resize(sample if number == 0 else further(), self.size)
            y0, y1, x0, x1 = max(top, 0), min(top + H, 2 * H), max(left, 0), min(left + W, 2 * W)
            inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
            image[:, y0:y1, x0:x1] = tile["image"][:, *inside].as_subclass(Tensor)
            if mask is not None:
                mask[y0:y1, x0:x1] = tile["mask"][inside].as_subclass(Tensor)
            if "boxes" in tile:
                shifted = tile["boxes"].as_subclass(Tensor) - torch.tensor([x0 - left, y0 - top] * 2)
                tile["boxes"] = _boxes(shifted, (y1 - y0, x1 - x0))
                sanitize_boxes(
                    tile, (y1 - y0, x1 - x0)
                )  # in the coordinates of the visible part, whose border cuts the boxes
                tile["boxes"] = tile["boxes"].as_subclass(Tensor) + torch.tensor([x0, y0] * 2)
                tiles.append(tile)
        out: Sample = {**sample, "image": tv_tensors.Image(image)}
        if mask is not None:
            out["mask"] = tv_tensors.Mask(mask)
        if tiles:
            out.update(_concatenate_boxes(tiles, (2 * H, 2 * W)))
        return out


class MixUp(MultiSampleTransform):
    """Averages two images and keeps the boxes of both (https://arxiv.org/abs/1902.04103).

    The second sample is flipped at random, resized by a random factor, and cropped or padded to the size of the first.

    Args:
        p: probability; otherwise the sample does not change.
        scale: (least, largest) factor of the second sample, as in `LargeScaleJitter`.
        fill: value of the pixels that the second image does not cover.
    """

    def __init__(self, p: float = 1.0, scale: Sequence[float] = (0.5, 1.5), fill: int = 114):
        super().__init__()
        self.p = _validate_probability(p)
        self.scale = _validate_range("scale", scale)
        self.fill = fill

    def forward(self, sample: Sample, further: DrawSample) -> Sample:  # type: ignore[override]
        if "boxes" not in sample or "mask" in sample:
            raise ValueError(
                f"MixUp combines samples with boxes and without a mask, the sample has {', '.join(sample)}"
            )
        if torch.rand(()) >= self.p:
            return sample
        size = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
        second = {key: value for key, value in further().items() if key in _PARTS}
        second = LargeScaleJitter(size, self.scale, self.fill)(v2.RandomHorizontalFlip()(second))
        sanitize_boxes(second, size)
        # Halving before the sum keeps uint8, which is 40 times as fast as blending floats.
        one, two = (part["image"].as_subclass(Tensor) >> 1 for part in (sample, second))
        return {**sample, "image": tv_tensors.Image(one.add_(two)), **_concatenate_boxes([sample, second], size)}


def _resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Return the image of a sample with its boxes and mask resized to (H, W)."""
    moving = ("image", "boxes", "mask")
    return {
        key: F.resize(sample[key], list(size), antialias=True) if key in moving else sample[key]
        for key in _PARTS
        if key in sample
    }


def _concatenate_boxes(samples: Sequence[Sample], size: tuple[int, int]) -> Sample:
    """Return boxes, labels and crowd flags of several samples in one; `size` is (H, W) of their common image."""
    boxes = torch.cat([sample["boxes"].as_subclass(Tensor) for sample in samples])
    out: Sample = {"boxes": _boxes(boxes, size), "labels": torch.cat([sample["labels"] for sample in samples])}
    if "iscrowd" in samples[0]:
        out["iscrowd"] = torch.cat([sample["iscrowd"] for sample in samples])
    return out


def _boxes(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _validate_range(name: str, given: Sequence[float]) -> tuple[float, float]:
    if len(given) != 2 or not 0 < given[0] <= given[1]:
        raise ValueError(f"{name} is {list(given)}; give (least, largest), both above 0")
    return float(given[0]), float(given[1])


def _validate_probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must lie in 0..1")
    return p
