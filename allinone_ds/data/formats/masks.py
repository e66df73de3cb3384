"""From the class ids stored in a label map to the mask of a sample."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from allinone_ds.data.base import IGNORE, Problem
from allinone_ds.errors import BrokenSample, DataError

_EXAMINED = 8  # label maps that `single_class_warning` reads


def validate_class_ids(name: str, classes: int, first_id: int, ignore_index: int) -> None:
    """Raise a `DataError` if label maps cannot have this number of classes or this ignored value.

    Args:
        name: the file that the message names.
        classes: number of classes K.
        first_id: stored id of the first class.
        ignore_index: stored value of the pixels without a class.
    """
    if not 1 <= classes <= IGNORE or first_id <= ignore_index < first_id + classes:
        raise DataError(
            f"{name}: {classes} classes with ids from {first_id}, and ignore_index {ignore_index}; "
            "give 1 to 255 classes, and an ignore_index that is not a class id"
        )


def ids_to_labels(stored: np.ndarray, path: str, labels: np.ndarray, ignore_index: int, first_id: int) -> np.ndarray:
    """Return the labels of a label map.

    Args:
        stored: integers (H, W).
        path: the file that errors name.
        labels: uint8 (K,), the label of each class in the order of the stored ids.
        ignore_index: stored value of the pixels without a class.
        first_id: stored id of the first class.

    Returns:
        uint8 (H, W), 0..K-1 or 255

    Raises:
        BrokenSample: a value is neither a class id nor `ignore_index`.
    """
    last_id = first_id + len(labels) - 1
    ignored = stored == ignore_index
    unknown = ((stored < first_id) | (stored > last_id)) & ~ignored
    if unknown.any():
        values = ", ".join(str(v) for v in np.unique(stored[unknown])[:5])
        raise BrokenSample(
            path,
            f"contains {values} in {int(unknown.sum())} pixels; allowed are {first_id}..{last_id} and {ignore_index} "
            "(ignore); correct the label map, 'classes', 'first_id' or 'ignore_index'",
        )
    mask = labels[np.where(ignored, 0, stored - first_id)]
    mask[ignored] = IGNORE
    return mask


def check_mask_size(mask: np.ndarray, image: torch.Tensor, path: str) -> None:
    """Raise a `BrokenSample` if a mask (H, W) differs in size from its image (3, H, W)."""
    if mask.shape != image.shape[1:]:
        raise BrokenSample(
            path,
            f"is {mask.shape[1]} x {mask.shape[0]} (width x height), its image is {image.shape[2]} x {image.shape[1]} "
            "(upright); write the label map in the size of the image",
        )


def single_class_warning(dataset: Any, ignore_index: int) -> list[Problem]:
    """Return a warning if the label maps of several classes contain only one class and ignored pixels.

    Two classes stored as 0 and 255 look like this. The second class would be ignored, and both loss and mIoU would be
    perfect.

    Args:
        dataset: a dataset whose method `mask` reads the mask of one sample; eight of them are read.
        ignore_index: stored value of the pixels without a class.
    """
    found: set[int] = set()
    for index in np.linspace(0, len(dataset) - 1, min(_EXAMINED, len(dataset))).astype(int).tolist():
        with contextlib.suppress(BrokenSample):
            found |= set(np.unique(dataset.mask(index)).tolist())
    if len(dataset.classes) == 1 or IGNORE not in found or len(found) != 2:
        return []
    reason = (
        f"the label maps that were read contain no class but '{dataset.classes[min(found)]}'; all other pixels are "
        f"{ignore_index}, which is ignored; if {ignore_index} stands for a class, store that class's id instead"
    )
    return [Problem(dataset.name, reason, "warning")]
