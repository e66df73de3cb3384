"""Test-time augmentation: the views of an image, whose predictions a task merges into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from allinone_ds.strict import Strict

_OVERLAP = 3
"""Neighbouring windows overlap by at least 1 / _OVERLAP of their side."""


class TestTime(Strict):
    """Which views of an image are predicted and averaged in evaluation and prediction (`tasks.NAME.test_time`).

    Example:
        >>> TestTime(scales=[1.0, 1.5], flip=True).windows
        False
    """

    __test__ = False  # pytest would collect the class as a test

    scales: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Sizes of the views relative to `image_size`, rounded to whole patches."""
    flip: bool = False
    """Also predict the mirror image of each view."""
    windows: bool = False
    """Segmentation: predict a view larger than `image_size` in windows of that size, which slide over the view and
    overlap by a third, instead of all at once."""


@dataclass
class View:
    """The model's outputs for one view of a batch.

    Attributes:
        size: (H, W) of the view in pixels.
        flipped: whether left and right are swapped.
        outputs: what the task's `forward` returned, once for the whole view or once per window.
        corners: (top, left) of each window in the view in pixels.
    """

    size: tuple[int, int]
    flipped: bool
    outputs: list[Any]
    corners: list[tuple[int, int]]


def view_size(image_size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """Return (H, W) of a view: `scale` times the image size, rounded to positive multiples of `stride`.

    Example:
        >>> view_size((32, 48), 0.75, 16)
        (32, 32)
    """
    H, W = (max(round(side * scale / stride), 1) * stride for side in image_size)
    return H, W


def view_sizes(
    options: TestTime, image_size: tuple[int, int], multiple: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return (H, W) of the view of each scale, and of the part of it that one forward sees, in pixels.

    Args:
        options: the views.
        image_size: (H, W) of the network's input.
        multiple: number of which sides are multiples.

    Example:
        >>> view_sizes(TestTime(scales=[0.5, 2.0], windows=True), (32, 32), 16)
        [((16, 16), (16, 16)), ((64, 64), (32, 32))]
    """
    sizes = []
    for scale in options.scales:
        size = window = view_size(image_size, scale, multiple)
        if options.windows and (size[0] > image_size[0] or size[1] > image_size[1]):
            window = min(size[0], image_size[0]), min(size[1], image_size[1])
        sizes.append((size, window))
    return sizes


def window_corners(size: tuple[int, int], window: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (top, left) of the windows that cover a view; the last ones end at its border.

    Args:
        size: (H, W) of the view in pixels.
        window: (H, W) of a window in pixels.

    Example:
        >>> window_corners((16, 70), (32, 32))
        [(0, 0), (0, 22), (0, 38)]
    """
    return [(top, left) for top in _starts(size[0], window[0]) for left in _starts(size[1], window[1])]


def _starts(side: int, window: int) -> list[int]:
    step = max(window - window // _OVERLAP, 1)
    last = max(side - window, 0)
    return [*range(0, last, step), last]
