"""Names, tolerances and pairs of keypoints, and the similarity of two sets of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allinone_ds.data.formats.common.points import mirrored_order

PERSON = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
"""The 17 points of a person in COCO."""
_PERSON_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
)  # fmt: skip
_SIGMA = 0.05
"""Tolerance of a point of other objects, relative to the square root of the object's area, if none is given."""


def point_names(points: int | Sequence[str]) -> list[str]:
    """Return the names of the points of an object; without names those of a person in COCO, or their numbers."""
    if not isinstance(points, int):
        return list(points)
    return list(PERSON) if points == len(PERSON) else [str(number) for number in range(points)]


def default_sigmas(names: Sequence[str]) -> list[float]:
    """Return COCO's tolerances for the points of a person, 0.05 for each point of anything else."""
    return list(_PERSON_SIGMAS) if list(names) == list(PERSON) else [_SIGMA] * len(names)


def has_sides(names: Sequence[str]) -> bool:
    """Return whether some names contain left or right, so that a mirrored image is understood."""
    return mirrored_order(names) != list(range(len(names)))


def oks(points: Tensor, truth: Tensor, visible: Tensor, area: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Return the object keypoint similarity of COCO, the mean of exp(-d^2 / (2 area (2 sigma)^2)) over visible points.

    Args:
        points: (m, P, 2) predicted.
        truth: (n, P, 2).
        visible: (n, P), above 0 for points that count.
        area: (n,) in squared pixels.
        sigmas: P tolerances.

    Returns:
        float64 (m, n), 0 for an object without a visible point.
    """
    distance = (points.double()[:, None] - truth.double()[None]).square().sum(-1)  # (m, n, P)
    variance = (2 * torch.tensor(sigmas, dtype=torch.float64)).square()
    similar = torch.exp(-distance / (2 * variance * (area.double()[None, :, None] + torch.finfo(torch.float64).eps)))
    counted = (visible > 0).double()[None]
    return (similar * counted).sum(-1) / counted.sum(-1).clamp(min=1)
