"""Checks of boxes, and the fields of a detection sample."""

from __future__ import annotations

import numpy as np
import torch
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import select
from allinone_ds.data.base import Sample

BOX_TOLERANCE = 1.0
"""Pixels by which a box may extend beyond its image. Less is rounding and is cut off, more is an error."""

FRACTIONS_REASON = "all boxes lie within 0..1, as fractions of the image; multiply them by its width and height"

POINT_FRACTIONS_REASON = (
    "all keypoints lie within 0..1, as fractions of the image; multiply them by its width and height"
)


def boxes_outside(boxes: np.ndarray, size: tuple[int | np.ndarray, int | np.ndarray]) -> np.ndarray:
    """Return which boxes extend beyond their image by more than `BOX_TOLERANCE` pixels.

    Args:
        boxes: (n, 4) XYXY in pixels.
        size: (H, W) of the image, or (H of each box, W of each box).

    Returns:
        bool (n,)
    """
    height, width = size
    low = (boxes[:, :2] < -BOX_TOLERANCE).any(axis=1)
    return low | (boxes[:, 2] > width + BOX_TOLERANCE) | (boxes[:, 3] > height + BOX_TOLERANCE)


def outside_reason(box: np.ndarray, size: tuple[int, int]) -> str:
    """Return the reason text for a box (4,) XYXY outside an image of `size` (H, W)."""
    corners = ", ".join(f"{v:g}" for v in box)
    return (
        f"box (x1 y1 x2 y2 = {corners}) lies outside its image of {size[1]} x {size[0]} (width x height); "
        "correct or remove the annotation"
    )


def are_fractions(boxes: np.ndarray) -> bool:
    """Return whether boxes (n, 4) XYXY are fractions of the image: no corner exceeds 1, yet some box has area."""
    return bool((boxes[:, 2:] > boxes[:, :2]).all(axis=1).any() and boxes.max() <= 1)


def detection_fields(
    boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, size: tuple[int, int], more: Sample | None = None
) -> Sample:
    """Return `boxes`, `labels` and `iscrowd` of a sample: boxes cut at the border, those without area left out.

    Args:
        boxes: float32 (n, 4) XYXY in pixels.
        labels: int64 (n,).
        crowd: bool (n,).
        size: (H, W) of the image.
        more: further keys with one entry per box.
    """
    boxes = boxes.clip(0, np.array([size[1], size[0]] * 2, dtype=np.float32))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    xyxy = tv_tensors.BoundingBoxFormat.XYXY
    kept = torch.from_numpy(keep)
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes[keep]), format=xyxy, canvas_size=size),
        "labels": torch.from_numpy(labels[keep]),
        "iscrowd": torch.from_numpy(crowd[keep]),
        **{key: select(value, kept) for key, value in (more or {}).items()},
    }
