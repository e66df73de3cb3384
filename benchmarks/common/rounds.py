"""Alternating rounds: every candidate runs once per round, so that other load on the machine affects all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def rotate(names: Iterable[str], number: int) -> list[str]:
    """Return the order of a round; the first candidate changes from round to round, so that none is always first."""
    order = list(names)
    first = number % len(order)
    return order[first:] + order[:first]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median over rounds of seconds / base, and the lower and the upper quartile.

    Args:
        seconds: of one candidate, one value per round.
        base: of the candidate that it is compared with, in the same rounds.
    """
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
    quarter = len(ratios) // 4
    return statistics.median(ratios), [ratios[quarter], ratios[-1 - quarter]]
