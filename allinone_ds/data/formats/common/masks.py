"""From the class ids or colours stored in a label map to the mask of a sample."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from allinone_ds.data.base import IGNORE, Problem
from allinone_ds.errors import BrokenSample, ConfigError, DataError

_EXAMINED = 8  # label maps that `single_class_warning` reads


def validate_class_ids(
    name: str, classes: int, first_id: int, ignore_index: int, class_ids: Sequence[int] | None = None
) -> None:
    """Raise a `DataError` if label maps cannot have this number of classes or this ignored value.

    Args:
        name: the file that the message names.
        classes: number of classes K.
        first_id: stored id of the first class.
        ignore_index: stored value of the pixels without a class.
        class_ids: stored id of each class; None counts them from `first_id`.
    """
    if class_ids is not None and (len(class_ids) != classes or len(set(class_ids)) < len(class_ids)):
        raise DataError(f"{name}: class_ids has {len(class_ids)} ids for {classes} classes; give each class one id")
    if class_ids is not None and 1 <= classes <= IGNORE:
        return
    if not 1 <= classes <= IGNORE or first_id <= ignore_index < first_id + classes:
        raise DataError(
            f"{name}: {classes} classes with ids from {first_id}, and ignore_index {ignore_index}; "
            "give 1 to 255 classes, and an ignore_index that is not a class id"
        )


def check_numbering(class_ids: Sequence[int] | None, first_id: int) -> None:
    """Raise a `ConfigError` if a source gives both the ids of its classes and the first of them."""
    if class_ids is not None and first_id:
        raise ConfigError("'class_ids' and 'first_id' are both set; remove 'first_id'")


def colors_to_labels(
    stored: np.ndarray, path: str, labels: np.ndarray, class_colors: Sequence[int], ignored: Sequence[int]
) -> np.ndarray:
    """Return the labels of a label map of colours.

    Args:
        stored: colours (H, W), see `read_color_map`.
        path: the file that errors name.
        labels: uint8 (K,), the label of each class in the order of the colours.
        class_colors: colour of each class.
        ignored: colours of the pixels without a class.

    Returns:
        uint8 (H, W), 0..K-1 or 255

    Raises:
        BrokenSample: a colour stands for nothing.
    """
    known = np.array([*class_colors, *ignored])
    meaning = np.array([*labels, *[IGNORE] * len(ignored)], dtype=np.uint8)
    order = np.argsort(known)
    place = order[np.searchsorted(known[order], stored).clip(max=len(known) - 1)]  # (H, W)
    unknown = known[place] != stored
    if unknown.any():
        colors, counts = np.unique(stored[unknown], return_counts=True)
        most = np.argsort(-counts)[:5]
        shown = ", ".join(f"{color_text(c)} ({n} pixels)" for c, n in zip(colors[most], counts[most], strict=True))
        raise BrokenSample(
            path,
            f"contains {len(colors)} colours that are neither in class_colors nor in ignore_colors: {shown}; list them "
            "there, or write the label map again without smoothing and without JPEG",
        )
    return meaning[place]


def color_number(color: Any) -> Any:
    """Return a colour, "#rrggbb" or [red, green, blue], as one number; see `read_color_map`.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> color_number("#0000ff"), color_number([1, 0, 0])
        (255, 65536)
    """
    if isinstance(color, str) and re.fullmatch("#[0-9a-fA-F]{6}", color):
        return int(color[1:], 16)
    if isinstance(color, Sequence) and len(color) == 3 and all(type(c) is int and 0 <= c <= 255 for c in color):
        return color[0] << 16 | color[1] << 8 | color[2]
    if type(color) is int and 0 <= color < 1 << 24:  # validated already
        return color
    raise ConfigError(f"{color!r}: give a colour as '#rrggbb' in quotes, or as [red, green, blue] of 0..255")


def color_text(number: int) -> str:
    """Return a colour of `color_number` as "#rrggbb"."""
    return f"#{number:06x}"


def ids_to_labels(
    stored: np.ndarray,
    path: str,
    labels: np.ndarray,
    ignore_index: int,
    first_id: int,
    class_ids: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the labels of a label map.

    Args:
        stored: integers (H, W).
        path: the file that errors name.
        labels: uint8 (K,), the label of each class in the order of the stored ids.
        ignore_index: stored value of the pixels without a class.
        first_id: stored id of the first class.
        class_ids: stored id of each class; None counts them from `first_id`. An id in it is a class even if it equals
            `ignore_index`.

    Returns:
        uint8 (H, W), 0..K-1 or 255

    Raises:
        BrokenSample: a value is neither a class id nor `ignore_index`.
    """
    if class_ids is not None:
        stored, ignore_index = _numbered(stored, class_ids, ignore_index, path), -1
        first_id = 0
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


def _numbered(stored: np.ndarray, class_ids: Sequence[int], ignore_index: int, path: str) -> np.ndarray:
    """Return the position of each pixel's id in `class_ids`, int64 (H, W), -1 for pixels without a class."""
    order = np.argsort(class_ids)
    ascending = np.asarray(class_ids)[order]
    place = np.searchsorted(ascending, stored).clip(max=len(ascending) - 1)  # (H, W)
    known = ascending[place] == stored
    unknown = ~known & (stored != ignore_index)
    if unknown.any():
        values = ", ".join(str(v) for v in np.unique(stored[unknown])[:5])
        raise BrokenSample(
            path,
            f"contains {values} in {int(unknown.sum())} pixels; allowed are {', '.join(map(str, ascending[:20]))} and "
            f"{ignore_index} (ignore); correct the label map, 'class_ids' or 'ignore_index'",
        )
    return np.where(known, order[place], -1)


def check_mask_size(mask: np.ndarray, image: torch.Tensor | np.ndarray, path: str, what: str = "label map") -> None:
    """Raise a `BrokenSample` if a mask (..., H, W), which messages call `what`, has not the size of its image."""
    if mask.shape[-2:] != image.shape[1:]:
        raise BrokenSample(
            path,
            f"is {mask.shape[-1]} x {mask.shape[-2]} (width x height), its image is {image.shape[2]} x "
            f"{image.shape[1]} (upright); write the {what} in the size of the image",
        )


def single_class_warning(
    dataset: Any, ignored: int | str, advice: str = "store that class's id instead"
) -> list[Problem]:
    """Return a warning if the label maps of several classes contain only one class and ignored pixels.

    Two classes stored as 0 and 255 look like this. The second class would be ignored, and both loss and mIoU would be
    perfect.

    Args:
        dataset: a dataset whose method `mask` reads the mask of one sample; eight of them are read.
        ignored: stored value of the pixels without a class.
        advice: what to do if that value stands for a class.
    """
    found: set[int] = set()
    for index in np.linspace(0, len(dataset) - 1, min(_EXAMINED, len(dataset))).astype(int).tolist():
        with contextlib.suppress(BrokenSample):
            found |= set(np.unique(dataset.mask(index)).tolist())
    if len(dataset.classes) == 1 or IGNORE not in found or len(found) != 2:
        return []
    reason = (
        f"the label maps that were read contain no class but '{dataset.classes[min(found)]}'; all other pixels are "
        f"{ignored}, which is ignored; if {ignored} stands for a class, {advice}"
    )
    return [Problem(dataset.name, reason, "warning")]
