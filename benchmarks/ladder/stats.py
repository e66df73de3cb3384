"""Statistics of the ladder: paired tests over seeds, Holm's correction, and the smallest detectable effect."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """Mean of paired differences and the result of a two-sided paired t-test."""

    n: int
    mean: float
    low: float
    """Lower end of the 95 % confidence interval of the mean."""
    high: float
    p: float
    detectable: float
    """The smallest true mean difference detected with 80 % power at level 0.05, for the observed spread."""


def compare(differences: Sequence[float]) -> Comparison:
    """Test paired differences, one per seed, against 0.

    Args:
        differences: at least two.
    """
    from scipy import stats

    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Comparison(n, mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean / error), n - 1))
    return Comparison(n, mean, mean - half, mean + half, p, smallest_effect(n) * error * math.sqrt(n))


@lru_cache
def smallest_effect(n: int, power: float = 0.8) -> float:
    """Return the smallest mean difference that a two-sided paired t-test detects at level 0.05.

    Args:
        n: pairs.
        power: probability of detecting it.

    Returns:
        The difference in standard deviations of the differences.
    """
    import numpy as np
    from scipy import stats
    from scipy.optimize import brentq

    edge = stats.t.ppf(1 - ALPHA / 2, n - 1)
    # Power, averaged over quantiles of the sample standard deviation; scipy's noncentral t gives NaN in its tails.
    levels = (np.arange(4000) + 0.5) / 4000
    limits = edge * np.sqrt(stats.chi2.ppf(levels, n - 1) / (n - 1))

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift))) - power

    return float(brentq(missing, 0.01, 100))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values of a family of tests, in the given order."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def relative_change(scores: Mapping[str, float], single: Mapping[str, float], absolute: Collection[str] = ()) -> float:
    """Return the mean over the tasks of `single` of (multi-task score - single-task score) / single-task score.

    Args:
        scores: task -> score of the multi-task model.
        single: task -> score of the single-task model.
        absolute: tasks that count by the difference of the scores alone.
    """
    return statistics.fmean(
        (scores[task] - alone) / (1.0 if task in absolute else alone) for task, alone in single.items()
    )
