"""From the class ids or colours stored in a label map to the mask of a sample."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from allinone_ds.data.base import IGNORE, Problem
from allinone_ds.errors import BrokenSample, ConfigError, DataError

_EXAMINED = 8  # label maps that `single_class_warning` reads


Ids = Sequence[int | Sequence[int]]
"""The stored id of each class; several ids of one class are a sequence."""


def validate_class_ids(
    name: str, classes: int, first_id: int, ignored: Sequence[int], class_ids: Ids | None = None
) -> None:
    """Raise a `DataError` if label maps cannot have this number of classes or these ignored values.

    Args:
        name: the file that the message names.
        classes: number of classes K.
        first_id: stored id of the first class.
        ignored: stored values of the pixels without a class.
        class_ids: stored id, or ids, of each class; None counts them from `first_id`.
    """
    if class_ids is not None:
        flat = [stored for stored, _ in _flat(class_ids)]
        if len(class_ids) != classes or len(set(flat)) < len(flat) or [] in class_ids:
            twice = sorted({i for i in flat if flat.count(i) > 1})
            more = f" ({', '.join(map(str, twice))} more than once)" if twice else ""
            raise DataError(
                f"{name}: class_ids has {len(class_ids)} ids for {classes} classes{more}; give each class one id, or a "
                "list of ids of its own"
            )
        if 1 <= classes <= IGNORE:
            return
    if not 1 <= classes <= IGNORE or any(first_id <= value < first_id + classes for value in ignored):
        raise DataError(
            f"{name}: {classes} classes with ids from {first_id}, and ignore_index {_listed(ignored)}; "
            "give 1 to 255 classes, and an ignore_index that is not a class id"
        )


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
    meaning = dict.fromkeys(ignored, IGNORE) | dict(zip(class_colors, labels.tolist(), strict=True))
    mask, unknown = _look_up(stored, meaning)
    if unknown.any():
        colors, counts = np.unique(stored[unknown], return_counts=True)
        most = np.argsort(-counts)[:5]
        shown = ", ".join(f"{color_text(c)} ({n} pixels)" for c, n in zip(colors[most], counts[most], strict=True))
        raise BrokenSample(
            path,
            f"contains {len(colors)} colours that are neither in class_colors nor in ignore_colors: {shown}; list them "
            "there, or write the label map again without smoothing and without JPEG",
        )
    return mask


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
    ignored: Sequence[int],
    first_id: int,
    class_ids: Ids | None = None,
) -> np.ndarray:
    """Return the labels of a label map.

    Args:
        stored: integers (H, W).
        path: the file that errors name.
        labels: uint8 (K,), the label of each class in the order of the stored ids.
        ignored: stored values of the pixels without a class.
        first_id: stored id of the first class.
        class_ids: stored id, or ids, of each class; None counts them from `first_id`. An id in it is a class even if
            it is in `ignored`.

    Returns:
        uint8 (H, W), 0..K-1 or 255

    Raises:
        BrokenSample: a value is neither a class id nor ignored.
    """
    ids = _flat(range(first_id, first_id + len(labels)) if class_ids is None else class_ids)
    meaning = dict.fromkeys(ignored, IGNORE) | {i: int(labels[place]) for i, place in ids}
    mask, unknown = _look_up(stored, meaning)
    if unknown.any():
        values = _listed(np.unique(stored[unknown])[:5])
        last_id = first_id + len(labels) - 1
        allowed = f"{first_id}..{last_id}" if class_ids is None else _listed(sorted(i for i, _ in ids)[:20])
        keys = "'classes', 'first_id'" if class_ids is None else "'class_ids'"
        raise BrokenSample(
            path,
            f"contains {values} in {int(unknown.sum())} pixels; allowed are {allowed} and {_listed(ignored)} (ignore); "
            f"correct the label map, {keys} or 'ignore_index'",
        )
    return mask


def _look_up(stored: np.ndarray, meaning: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the stored numbers (H, W) stand for, uint8, and which of them stand for nothing."""
    if stored.dtype in (np.uint8, np.uint16):
        table = np.full(np.iinfo(stored.dtype).max + 1, -1, dtype=np.int16)
        for number, label in meaning.items():
            if 0 <= number < len(table):
                table[number] = label
        found = table[stored]
        return found.astype(np.uint8), found < 0
    known = np.array(sorted(meaning))
    place = np.searchsorted(known, stored).clip(max=len(known) - 1)  # (H, W)
    labels = np.array([meaning[number] for number in known.tolist()], dtype=np.uint8)
    return labels[place], known[place] != stored


def _flat(class_ids: Ids) -> list[tuple[int, int]]:
    """Return (stored id, position of its class) of all ids."""
    several = ([ids] if isinstance(ids, int) else ids for ids in class_ids)
    return [(stored, place) for place, ids in enumerate(several) for stored in ids]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def check_mask_size(mask: np.ndarray, image: torch.Tensor | np.ndarray, path: str, what: str = "label map") -> None:
    """Raise a `BrokenSample` if a mask (..., H, W), which messages call `what`, has not the size of its image."""
    if mask.shape[-2:] != image.shape[1:]:
        raise BrokenSample(
            path,
            f"is {mask.shape[-1]} x {mask.shape[-2]} (width x height), its image is {image.shape[2]} x "
            f"{image.shape[1]} (upright); write the {what} in the size of the image",
        )


def single_class_warning(dataset: Any, ignored: str, advice: str = "store that class's id instead") -> list[Problem]:
    """Return a warning if the label maps of several classes contain only one class and ignored pixels.

    Two classes stored as 0 and 255 look like this. The second class would be ignored, and both loss and mIoU would be
    perfect.

    Args:
        dataset: a dataset whose method `mask` reads the mask of one sample; eight of them are read.
        ignored: stored values of the pixels without a class.
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
