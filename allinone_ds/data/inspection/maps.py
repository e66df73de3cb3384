"""Count what can be learned from depths, surface normals, edges and salient pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from allinone_ds.data.base import IGNORE, Sample

_FAR = 3.0  # times the 99th percentile of all other depths: a value beyond it that occurs often is suspicious
_OFTEN = 1e-3  # fraction of the pixels
_UNITS = (0.02, 500.0)  # median depths outside of this range are rarely metres
_READ = 20_000  # numbers of a map that the statistics are computed from
_SPARSE = 0.01  # fraction of the pixels with a value, below which something is wrong even with a laser's points


class Inspected(NamedTuple):
    """What was found in some maps."""

    read: int
    """Maps that were read."""
    usable: int
    """Maps from which something can be learned; 0 also if all maps say the same."""
    none: str
    """What is wrong if none is usable."""
    warnings: list[str]


def depth(samples: Iterable[Sample]) -> Inspected | None:
    """Inspect depths (H, W); None for targets of another form."""
    maps = _maps(samples, "depth", 2)
    if maps is None:
        return None
    known = [values[np.isfinite(values)] for values in maps]
    found = _usable("depth", known)
    if not found.usable:
        return found
    share = sum(values.size for values in known) / sum(values.size for values in maps)
    if share < _SPARSE:
        found.warnings.append(f"{share:.2%} of the pixels have a depth{{seen}}; check 'scale', 'minimum' and 'maximum'")
    numbers = np.concatenate(known)
    median, largest = float(np.median(numbers)), float(numbers.max())
    often = float((numbers == largest).mean())
    rest = numbers[numbers < largest]
    if often > _OFTEN and rest.size and largest > _FAR * np.percentile(rest, 99):
        found.warnings.append(
            f"the depth {largest:.4g} stands in {often:.1%} of the pixels{{seen}}, far above the others (99 % below "
            f"{np.percentile(rest, 99):.4g}); if it means that there is no value, list the stored number in 'invalid', "
            "or set 'maximum'"
        )
    elif not _UNITS[0] <= median <= _UNITS[1]:
        found.warnings.append(
            f"the median depth is {median:.4g}{{seen}}; errors are in this unit; if the files are in millimetres, set "
            "scale: 0.001"
        )
    return found


def normals(samples: Iterable[Sample]) -> Inspected | None:
    """Inspect normals (3, H, W); None for targets of another form."""
    maps = _maps(samples, "normals", 3)
    if maps is None:
        return None
    known = [values[:, np.isfinite(values).all(axis=0)] for values in maps]  # (3, n)
    found = _usable("normals", known)
    towards = [float((vectors[2] > 0).mean()) for vectors in known if vectors.size]
    if found.usable and np.mean(towards) < 0.5:
        found.warnings.append(
            f"{1 - np.mean(towards):.0%} of the normals point away from the viewer{{seen}}; visible surfaces face the "
            "viewer; set negate: [z], or check the order of the channels"
        )
    return found


def edges(samples: Iterable[Sample]) -> Inspected | None:
    """Inspect edges (H, W); None for targets of another form."""
    return _binary(samples, "edges", "an edge")


def saliency(samples: Iterable[Sample]) -> Inspected | None:
    """Inspect salient pixels (H, W); None for targets of another form."""
    return _binary(samples, "saliency", "salient")


def _binary(samples: Iterable[Sample], key: str, what: str) -> Inspected | None:
    read, shares = 0, []  # shares: of the valid pixels of each map with one
    for sample in samples:
        values = np.asarray(sample[key]) if key in sample else np.empty(0)
        if values.ndim != 2:
            return None
        read += 1
        valid = values != IGNORE
        if valid.any():
            shares.append(float((values[valid] == 1).mean()))
    if not shares:
        return Inspected(read, 0, f"none of {read} maps has a value, all pixels are ignored", [])
    mean = float(np.mean(shares))
    if mean in (0.0, 1.0):
        every = "no pixel is" if mean == 0 else "every pixel is"
        return Inspected(read, 0, f"{every} {what} in {read} maps; check 'threshold' and 'invalid'", [])
    warnings = _empty(read, read - len(shares))
    if mean > 0.5:
        warnings.append(
            f"{mean:.0%} of the pixels are {what}{{seen}}; if the maps are inverted or grey, correct them or set "
            "'threshold'"
        )
    return Inspected(read, len(shares), "", warnings)


def _usable(key: str, known: Sequence[np.ndarray]) -> Inspected:
    """Count maps with different values; `known` holds the valid values (..., n) of each map."""
    filled = [values.reshape(-1, values.shape[-1]) for values in known if values.size]
    if not filled:
        return Inspected(len(known), 0, f"none of {len(known)} maps has a value, all pixels are invalid", [])
    first = filled[0][:, :1]
    if all((values == first).all() for values in filled):
        value = ", ".join(f"{number:.4g}" for number in first[:, 0])
        return Inspected(len(known), 0, f"all {len(known)} maps hold the same {key} ({value}) in every pixel", [])
    warnings = _empty(len(known), len(known) - len(filled))
    constant = sum(bool((values == values[:, :1]).all()) for values in filled)
    if constant:
        warnings.append(f"{constant} of {len(known)} maps hold the same {key} in every pixel{{seen}}")
    return Inspected(len(known), len(filled), "", warnings)


def _empty(read: int, empty: int) -> list[str]:
    return [f"{empty} of {read} maps that were read have no value in any pixel{{seen}}"] if empty else []


def _maps(samples: Iterable[Sample], key: str, dimensions: int) -> list[np.ndarray] | None:
    """Return the maps under `key`, thinned out; None if one is missing or has another form."""
    maps = []
    for sample in samples:
        values = np.asarray(sample[key]) if key in sample else np.empty(0)
        if values.ndim != dimensions:
            return None
        step = max(1, round((values.shape[-1] * values.shape[-2] / _READ) ** 0.5))
        maps.append(values[..., ::step, ::step])
    return maps
