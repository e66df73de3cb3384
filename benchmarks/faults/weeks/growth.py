"""Do descriptors, threads, memory and disk grow? Samples over time, and the verdict on them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 2**20
SLACK = {
    "descriptors": (2.0, 0.0),
    "threads": (1.0, 0.0),
    "memory": (24.0 * MIB, 0.0),
    "checkpoints": (1.0 * MIB, 0.03),
    "temporary files": (1.0 * MIB, 0.0),
    "shared memory": (1.0 * MIB, 0.0),
}
"""Quantity -> (in its unit, as a fraction of the first quarter): what the larger of both does not count as growth."""
LEAST = 8
"""Samples from which growth is told apart from noise."""
WARM_UP = 0.2
"""Fraction of a process's samples that are left out."""

Series = Sequence[tuple[float, float]]
"""(seconds, value) in the order of time."""


@dataclass(frozen=True)
class Growth:
    """How one quantity changed over time.

    Attributes:
        samples: number of samples after the warm-up.
        hours: between the first and the last of them.
        first: median of the first quarter.
        last: median of the last quarter.
        per_hour: slope of the straight line through all samples.
        grows: whether the last quarter is above the first by more than the slack, and the line rises.
    """

    samples: int
    hours: float
    first: float
    last: float
    per_hour: float
    grows: bool

    @property
    def change(self) -> float:
        """The last quarter minus the first."""
        return self.last - self.first


def growth(series: Series, slack: tuple[float, float]) -> Growth | None:
    """Compare the first and the last quarter of a series; None if it has fewer than `LEAST` samples.

    Args:
        series: samples after the warm-up.
        slack: (absolute, relative) change that does not count.

    Example:
        >>> growth([(60.0 * i, 100.0 + i) for i in range(40)], (5.0, 0.0)).grows
        True
    """
    if len(series) < LEAST:
        return None
    times, values = zip(*series, strict=True)
    quarter = len(values) // 4
    first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    slope = statistics.linear_regression(times, values).slope if len(set(times)) > 1 else 0.0
    grows = last - first > max(slack[0], slack[1] * abs(first)) and slope > 0
    return Growth(len(values), (times[-1] - times[0]) / 3600, first, last, slope * 3600, grows)


def after_warm_up(series: Series) -> Series:
    """Return a process's samples without those of its first fifth, in which caches and pools fill."""
    return series[int(WARM_UP * len(series)) :]


def verdict(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per quantity and process or folder: within the longest-lived processes, and from start to start.

    Args:
        samples: {"time": seconds, "start": number of the start, "of": {who: {quantity: value}}}. A new start
            begins new series of "rank N" and "launcher N", but not of "folder of RUN".

    Returns:
        {"of", "quantity", "over", ...the fields of `Growth`}, where "over" is "one start" or "all starts".
    """
    lives: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        for who, values in sample["of"].items():
            for quantity, value in values.items():
                lives[who, quantity][0 if who.startswith("folder") else sample["start"]].append((sample["time"], value))
    rows = []
    for (who, quantity), starts in sorted(lives.items()):
        slack = SLACK[quantity]
        within = [growth(after_warm_up(series), slack) for series in starts.values()]
        known = [found for found in within if found is not None]
        if known:
            longest = max(known, key=lambda found: (found.grows, found.samples))
            rows.append({"of": who, "quantity": quantity, "over": "one start", **asdict(longest)})
        settled = [after_warm_up(series) for series in starts.values() if len(series) > 1]
        between = [(series[0][0], statistics.median(value for _, value in series)) for series in settled]
        if not who.startswith("folder") and (found := growth(between, slack)) is not None:
            rows.append({"of": who, "quantity": quantity, "over": "all starts", **asdict(found)})
    return rows
