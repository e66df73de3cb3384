"""Masks and keypoints of the objects in COCO's annotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import Points
from allinone_ds.data.base import Problem, Sample
from allinone_ds.data.formats.common.boxes import BOX_TOLERANCE
from allinone_ds.data.formats.common.points import mirrored_order, order_of_pairs
from allinone_ds.errors import BrokenSample, DataError

OBJECT_KINDS = ("detection", "instances", "keypoints")
"""Kinds of data whose samples have boxes."""
Pairs = Sequence[tuple[int | str, int | str]]


def segmentation_fault(segmentation: Any, size: tuple[int, int] | None) -> str | None:
    """Return what is wrong with a segmentation before it is decoded, or None.

    Args:
        segmentation: polygons [[x1, y1, x2, y2, x3, y3, ...], ...], or run lengths {"size": [H, W], "counts": ...}.
        size: (H, W) of the image; None if it is not known.
    """
    if isinstance(segmentation, dict):
        stated, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(counts, str | list) or not isinstance(stated, list) or len(stated) != 2:
            return "segmentation needs 'size' ([height, width]) and 'counts', as run lengths of COCO have"
        if size is not None and tuple(stated) != size:
            return f"segmentation is of {stated[1]} x {stated[0]} (width x height), the image of {size[1]} x {size[0]}"
        if isinstance(counts, list) and not all(type(count) is int and count >= 0 for count in counts):
            return "segmentation: the counts of run lengths must be whole numbers, 0 or more"
        if isinstance(counts, list) and sum(counts) != stated[0] * stated[1]:
            return f"segmentation covers {sum(counts)} pixels, its size has {stated[0] * stated[1]}"
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return "has no segmentation; add polygons or run lengths, or use kind: detection"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "segmentation: a polygon needs at least three points, an x and a y each"
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in polygon):
            return "segmentation: the coordinates of a polygon must be numbers"
    return None


def apart(segmentation: Any, box: Sequence[float]) -> bool:
    """Return whether the polygons of an object lie outside of its box, x, y, width and height, by more than a pixel.

    Example:
        >>> apart([[20, 15, 30, 15, 30, 23]], [2, 3, 10, 8])
        True
    """
    if not isinstance(segmentation, list):
        return False
    xs, ys = ([v for polygon in segmentation for v in polygon[axis::2]] for axis in (0, 1))
    x, y, w, h = box
    return min(xs) > x + w + 1 or max(xs) < x - 1 or min(ys) > y + h + 1 or max(ys) < y - 1


def decode_mask(segmentation: Any, size: tuple[int, int], path: str) -> np.ndarray:
    """Return the mask of an object, uint8 (H, W) of 0 and 1.

    Args:
        segmentation: polygons or run lengths, checked by `segmentation_fault`.
        size: (H, W) of the image.
        path: the image, for errors.

    Raises:
        BrokenSample: the run lengths cannot be decoded.
    """
    try:
        if isinstance(segmentation, list):
            code = rle.merge(rle.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            code = rle.frPyObjects(segmentation, *size)
        else:
            code = segmentation
        mask = rle.decode(code)
    except (ValueError, TypeError, IndexError) as error:
        raise BrokenSample(path, f"segmentation cannot be decoded: {error}; write it again") from None
    if mask.shape != size:
        raise BrokenSample(path, f"segmentation is {mask.shape[1]} x {mask.shape[0]} (width x height); correct it")
    return mask


class PointNames:
    """Names of the keypoints of every class, and their order in a mirrored image.

    Args:
        source: the file that errors name.
        categories: COCO's categories in the order of the labels; None for a class that this file lacks.
        pairs: pairs of points that a mirrored image swaps; None: those whose names differ in left and right.

    Raises:
        DataError: classes have different numbers of points, or a pair is wrong.

    Attributes:
        count: number of points P; None if no category names its points.
        orders: for each label P places, or None.
    """

    def __init__(self, source: str, categories: Sequence[dict[str, Any] | None], pairs: Pairs | None) -> None:
        names = [[str(n) for n in (c or {}).get("keypoints") or []] for c in categories]
        counts = {len(points) for points in names if points}
        if len(counts) > 1:
            shown = ", ".join(f"{(c or {}).get('name')} {len(n)}" for c, n in zip(categories, names, strict=True) if n)
            raise DataError(
                f"{source}: categories have different numbers of keypoints ({shown}); use one task per number"
            )
        self.source, self.pairs = source, pairs
        self.count: int | None = counts.pop() if counts else None
        self.names = names

    def settle(self, found: int) -> None:
        """Take the number of points from the annotations, if no category names them."""
        self.count = self.count or found

    def orders(self) -> np.ndarray:
        """Return the order of the points in a mirrored image for each class, int64 (K, P)."""
        P = self.count or 0
        rows = []
        for own in self.names:
            points = own or [str(n) for n in range(P)]
            rows.append(
                mirrored_order(points) if self.pairs is None else order_of_pairs(self.pairs, points, self.source)
            )
        return np.array(rows, dtype=np.int64).reshape(len(self.names), P)

    def warning(self) -> Problem | None:
        """Return a warning if it is not known which points a mirrored image swaps."""
        P = self.count or 0
        if self.pairs is not None or P == 0 or (self.orders() != np.arange(P)).any():
            return None
        reason = (
            f"none of the {P} points is named left or right, so a flip moves them but keeps their numbers; if the left "
            "and the right of something are among them, set 'flip_pairs', otherwise 'flip_pairs: []'"
        )
        return Problem(self.source, reason, "warning")


def keypoint_fault(points: Any, count: int | None) -> str | None:
    """Return what is wrong with the keypoints of an annotation, or None.

    Args:
        points: [x1, y1, v1, ...]; None: the object has none.
        count: number of points P; None if it is not known yet.
    """
    if points is None:
        return None
    if not isinstance(points, list) or len(points) % 3 or not points:
        return "keypoints must be a list of x, y and visibility (0, 1 or 2) of every point"
    if count is not None and len(points) != 3 * count:
        return f"keypoints has {len(points) // 3} points, the category has {count}; give x, y and visibility of each"
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in points):
        return "keypoints: coordinates must be numbers"
    if not all(v in (0, 1, 2) for v in points[2::3]):
        wrong = next(v for v in points[2::3] if v not in (0, 1, 2))
        return f"keypoints: a visibility is {wrong}; allowed are 0 (no label), 1 (hidden) and 2 (visible)"
    return None


def split_points(points: Any, count: int) -> np.ndarray:
    """Return keypoints as float32 (P, 3), zeros if the object has none."""
    return np.array([0.0] * (3 * count) if points is None else points, dtype=np.float32).reshape(count, 3)


def points_outside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return which labelled points (n, P, 3) lie outside of their image of (H, W), bool (n, P)."""
    low = (points[..., :2] < -BOX_TOLERANCE).any(-1)
    high = (points[..., 0] > size[1] + BOX_TOLERANCE) | (points[..., 1] > size[0] + BOX_TOLERANCE)
    return (low | high) & (points[..., 2] > 0)


def keypoint_fields(points: np.ndarray, area: np.ndarray, orders: np.ndarray, size: tuple[int, int]) -> Sample:
    """Return `keypoints`, `visible`, `area` and `mirrored` of a sample; points outside are not visible.

    Args:
        points: float32 (n, P, 3).
        area: float32 (n,).
        orders: int64 (n, P), the order of the points in a mirrored image.
        size: (H, W) of the image.
    """
    visible = np.where(points_outside(points, size), 0, points[..., 2]).astype(np.uint8)
    return {
        "keypoints": Points(torch.from_numpy(points[..., :2].copy()), canvas_size=size),
        "visible": torch.from_numpy(visible),
        "area": torch.from_numpy(area),
        "mirrored": torch.from_numpy(orders),
    }


def mask_fields(segmentations: Sequence[Any], count: int, size: tuple[int, int], path: str) -> Sample:
    """Return `masks` of a sample from segmentations that were not checked before.

    Args:
        segmentations: of each object, polygons or run lengths.
        count: number of its boxes.
        size: (H, W) of the image.
        path: the image, for errors.

    Raises:
        BrokenSample: a segmentation is missing or wrong.
    """
    if len(segmentations) != count:
        raise BrokenSample(path, f"has {count} boxes and {len(segmentations)} segmentations; give one per box")
    for segmentation in segmentations:
        if fault := segmentation_fault(segmentation, size):
            raise BrokenSample(path, fault)
    masks = [decode_mask(segmentation, size, path) for segmentation in segmentations]
    stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
    return {"masks": tv_tensors.Mask(torch.from_numpy(stacked))}


def checked_keypoints(
    keypoints: Sequence[Any],
    areas: Sequence[Any],
    objects: tuple[np.ndarray, ...],
    names: PointNames,
    size: tuple[int, int],
    path: str,
) -> Sample:
    """Return the fields of `keypoint_fields` from keypoints that were not checked before.

    Args:
        keypoints: of each object x, y and visibility of every point, flat or in threes.
        areas: of each object, or empty.
        objects: boxes (n, 4), labels (n,) and crowd flags of the image.
        names: number and order of the points.
        size: (H, W) of the image.
        path: the image, for errors.

    Raises:
        BrokenSample: keypoints are missing or wrong.
    """
    boxes, labels = objects[0], objects[1]
    if len(keypoints) != len(boxes):
        raise BrokenSample(path, f"has {len(boxes)} boxes and keypoints of {len(keypoints)} objects; give one per box")
    flat = [[v for t in k for v in t] if k and isinstance(k[0], list | tuple) else k for k in keypoints]
    for points in flat:
        if fault := keypoint_fault(points, names.count):
            raise BrokenSample(path, fault)
        if points is not None:
            names.settle(len(points) // 3)
    P = names.count or 0
    stacked = np.stack([split_points(points, P) for points in flat]) if flat else np.zeros((0, P, 3), dtype=np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    stated = list(areas) or [None] * len(boxes)
    own = [a if isinstance(a, int | float) and a > 0 else w * h for a, (w, h) in zip(stated, sides, strict=True)]
    return keypoint_fields(stacked, np.array(own, dtype=np.float32), names.orders()[labels], size)
