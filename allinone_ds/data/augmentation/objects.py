"""What a transform leaves to be done for objects with keypoints or masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from allinone_ds.data.base import Sample

OF_OBJECTS = ("labels", "iscrowd", "keypoints", "visible", "area", "mirrored", "masks")
"""Keys of a sample with one entry per box."""


class Points(tv_tensors.KeyPoints):
    """Keypoints whose x runs from 0 at the left side of the image to W at the right one, as that of boxes does.

    torchvision 0.29 moves KeyPoints so under every transform but flips, which take x to W - 1 - x.

    Example:
        >>> F.horizontal_flip(Points([[3.0, 4.0]], canvas_size=(20, 30))).tolist()
        [[27.0, 4.0]]
    """


def _flipped(axis: int) -> None:
    """Register the flip of one axis, 0 for x."""

    @F.register_kernel((F.horizontal_flip, F.vertical_flip)[axis], Points)
    def flip(points: Points) -> Points:
        moved = points.as_subclass(Tensor).clone()
        moved[..., axis] = points.canvas_size[1 - axis] - moved[..., axis]
        return tv_tensors.wrap(moved, like=points)


_flipped(0)
_flipped(1)


def select(values: Tensor, keep: Tensor) -> Tensor:
    """Return some entries of the first axis; a tv_tensor keeps its type."""
    chosen = values.as_subclass(Tensor)[keep]
    return tv_tensors.wrap(chosen, like=values) if isinstance(values, tv_tensors.TVTensor) else chosen


def corner(size: tuple[int, int]) -> Points:
    """Return three points that move with an image: they turn the other way round when it is mirrored.

    Args:
        size: (H, W) of the image.
    """
    y, x = size[0] / 2, size[1] / 2  # far apart, so that no elastic distortion turns them
    return Points(torch.tensor([[x, y], [2 * x, y], [x, 2 * y]]), canvas_size=size)


def sanitize_objects(sample: Sample, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Put keypoints and masks right in place; return the boxes, and which objects can still be seen, bool (n,).

    Points outside of the image are no longer visible. If the image was mirrored, which `corner` shows, the points take
    the order of `mirrored`. Pixels of a mask that the image does not cover (255) do not belong to the object; objects
    without a pixel are dropped, and boxes are cut where the mask ends, which rotations make larger than the object.

    Args:
        sample: a transformed sample.
        boxes: (n, 4) XYXY, cut at the border.
        size: (H, W) of its image.
    """
    if "keypoints" in sample:
        points, visible = sample["keypoints"].as_subclass(Tensor), sample["visible"]  # (n, P, 2), (n, P)
        if "corner" in sample:
            (x1, y1), (x2, y2) = (
                sample["corner"].as_subclass(Tensor)[1:] - sample["corner"].as_subclass(Tensor)[0]
            ).tolist()
            if x1 * y2 - y1 * x2 < 0:
                order = sample["mirrored"]
                points, visible = points.gather(1, order[..., None].expand(-1, -1, 2)), visible.gather(1, order)
            sample["corner"] = corner(size)
        outside = (points < 0).any(-1) | (points[..., 0] > size[1]) | (points[..., 1] > size[0])
        sample["visible"] = torch.where(outside, 0, visible).to(torch.uint8)
        sample["keypoints"] = Points(points, canvas_size=size)
    if "masks" not in sample:
        return boxes, torch.ones(len(boxes), dtype=torch.bool)
    masks = sample["masks"].as_subclass(Tensor) == 1  # (n, H, W)
    sample["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
    rows, columns = masks.any(2), masks.any(1)
    seen = rows.any(1)
    limits = torch.stack(
        [_first(columns), _first(rows), size[1] - _first(columns.flip(1)), size[0] - _first(rows.flip(1))], 1
    )
    low, high = limits[:, :2] - 1, limits[:, 2:] + 1  # a pixel of tolerance: outlines lie between pixels
    return torch.cat([torch.maximum(boxes[:, :2], low), torch.minimum(boxes[:, 2:], high)], dim=1), seen


def _first(flags: Tensor) -> Tensor:
    """Return the position of the first True of each row, float32 (n,)."""
    return flags.float().argmax(1).float() if flags.shape[1] else flags.new_zeros(len(flags), dtype=torch.float32)
