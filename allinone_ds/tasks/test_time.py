"""Test-time augmentation: several views of an image, whose predictions a task makes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from allinone_ds.strict import Strict

_OVERLAP = 3
"""Neighbouring windows share at least a third of their side."""


class TestTime(Strict):
    """Which views of an image are predicted and averaged, in evaluation and prediction (`tasks.NAME.test_time`)."""

    __test__ = False  # no test of pytest's

    scales: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Sizes of the views as parts of `image_size`, rounded to whole patches."""
    flip: bool = False
    """Also the mirror image of every view."""
    windows: bool = False
    """Segmentation: a view larger than `image_size` is seen through windows of that size that slide over it, a third
    of each shared with the next, instead of at once."""


@dataclass
class View:
    """What the model said about one view of a batch.

    Attributes:
        size: (H, W) of the view, in pixels.
        flipped: whether left and right are swapped.
        outputs: what the task's `forward` returned: one for the whole view, or one a window.
        corners: (top, left) of each of them in the view, in pixels.
    """

    size: tuple[int, int]
    flipped: bool
    outputs: list[Any]
    corners: list[tuple[int, int]]


def view_size(image_size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """(H, W) of a view: `scale` times the image size, rounded to multiples of `stride`, one at least."""
    H, W = (max(round(side * scale / stride), 1) * stride for side in image_size)
    return H, W


def window_corners(size: tuple[int, int], window: tuple[int, int]) -> list[tuple[int, int]]:
    """(top, left) of the windows that cover a view, the last ones at its border; [(0, 0)] when one is enough."""
    return [(top, left) for top in _starts(size[0], window[0]) for left in _starts(size[1], window[1])]


def _starts(side: int, window: int) -> list[int]:
    step = max(window - window // _OVERLAP, 1)
    last = max(side - window, 0)
    return [*range(0, last, step), last]
