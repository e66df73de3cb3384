"""The points of a step, put together from those of its parts in earlier steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_LAST = "the optimizer step"
"""Under which the points after the last opening are kept, since they depend on no task."""


class PlannedParts:
    """Remembers the points of each part of a step: the blocks of tasks, and the optimizer step.

    Example:
        >>> parts = PlannedParts()
        >>> parts.plan(["task a", "step after a"])  # nothing is known yet
        []
        >>> parts.learn(["task a", "end of a", "step after a", "optimizer"])
        >>> _ = parts.plan(["task b", "step after b"])
        >>> parts.learn(["task b", "end of b", "step after b", "optimizer"])
        >>> parts.plan(["task b", "task a", "step after a, b"])
        ['task b', 'end of b', 'task a', 'end of a', 'step after a, b', 'optimizer']
    """

    def __init__(self) -> None:
        self._openings: list[str] = []
        self._parts: dict[str, list[str]] = {}  # first point -> those after it, as the part went last

    def plan(self, openings: Sequence[str]) -> list[str]:
        """Return the points of the next step; none if one of its parts is not known.

        Args:
            openings: the first point of each part, in order; the last one is that of the optimizer step.
        """
        self._openings = list(openings)
        keys = [*openings[:-1], _LAST]
        if not all(key in self._parts for key in keys):
            return []
        return [p for opening, key in zip(openings, keys, strict=True) for p in (opening, *self._parts[key])]

    def learn(self, points: Sequence[str] | None) -> None:
        """Remember the parts of the step that was planned last, if one was.

        Args:
            points: of the step; None: it was given up. Ranks may then know different parts, so all are forgotten.
        """
        if points is None:
            self._parts = {}
        elif self._openings:
            starts = [place for place, point in enumerate(points) if point in self._openings]
            for start, end in itertools.pairwise([*starts, len(points)]):
                key = _LAST if points[start] == self._openings[-1] else points[start]
                self._parts[key] = list(points[start + 1 : end])
        self._openings = []
