"""Test-time augmentation: the views of an image, whose predictions a task merges into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from allinone_ds.errors import ConfigError
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


def refuse_windows(task: str, kind: str, options: TestTime) -> None:
    """Refuse windows, which show only a part of an image.

    Args:
        task: name of the task.
        kind: its kind.
        options: its views.

    Raises:
        ConfigError: `windows` is set.
    """
    if options.windows:
        raise ConfigError(
            f"tasks.{task}.test_time.windows: a window shows only a part of the image and may cut objects, so {kind} "
            "cannot merge windows, which are for kinds with a value per pixel; remove it"
        )


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


def merged_views(
    views: Sequence[View],
    sizes: Sequence[tuple[int, int]],
    window: tuple[int, int],
    values: Callable[[Any], Tensor],
    unflipped: Callable[[Tensor], Tensor] = lambda values: values.flip(-1),
) -> list[Tensor]:
    """Return the mean over views of the maps of each image, (1, C, H, W) at its size; windows are averaged before.

    Args:
        views: outputs for each view.
        sizes: (H, W) of each original image in pixels.
        window: largest (H, W) of a window in pixels.
        values: returns (B, C, h, w) that may be averaged, of the outputs of one forward.
        unflipped: returns the values of a mirrored view as they are in the image.
    """
    totals: list[Tensor | None] = [None] * len(sizes)
    for view in views:
        maps = _joined(view, window, values)
        if view.flipped:
            maps = unflipped(maps)
        for place, (each, size) in enumerate(zip(maps, sizes, strict=True)):
            before, added = totals[place], resized(each[None], size)
            totals[place] = added if before is None else before + added
    return [total / len(views) for total in totals if total is not None]


def _joined(view: View, window: tuple[int, int], values: Callable[[Any], Tensor]) -> Tensor:
    """Return maps (B, C, H, W) put together from windows, or (B, C, h, w) of a view without."""
    parts = [values(outputs) for outputs in view.outputs]
    if len(parts) == 1:
        return parts[0]
    H, W = (min(side, most) for side, most in zip(view.size, window, strict=True))
    total = parts[0].new_zeros(*parts[0].shape[:2], *view.size)
    count = total.new_zeros(view.size)
    for part, (top, left) in zip(parts, view.corners, strict=True):
        total[..., top : top + H, left : left + W] += resized(part, (H, W))
        count[top : top + H, left : left + W] += 1
    return total / count


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (B, C, h, w) interpolated to (H, W), float32."""
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
