"""Keypoints of objects: the order of their points in a mirrored image."""

from __future__ import annotations

import re
from collections.abc import Sequence

from allinone_ds.errors import DataError

_SIDE = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])")


def mirrored_order(names: Sequence[str]) -> list[int]:
    """Return for each point the one that takes its place in a mirrored image: the right ear for the left one.

    Args:
        names: names of the points; those that differ only in left and right, or l and r, are a pair.

    Example:
        >>> mirrored_order(["nose", "left_ear", "right_ear"])
        [0, 2, 1]
    """
    other = {"left": "right", "right": "left", "l": "r", "r": "l"}
    lower = [name.lower() for name in names]
    place = {name: number for number, name in enumerate(lower)}
    mirrored = [_SIDE.sub(lambda side: other[side[0]], name) for name in lower]
    return [place.get(name, number) for number, name in enumerate(mirrored)]


def order_of_pairs(pairs: Sequence[tuple[int | str, int | str]], names: Sequence[str], source: str) -> list[int]:
    """Return the order of the points in a mirrored image from a config's pairs.

    Args:
        pairs: names or numbers (from 0) of two points each.
        names: names of the P points.
        source: the file that errors name.

    Raises:
        DataError: a pair names no point, or a point is in two pairs.
    """
    order = list(range(len(names)))
    for pair in pairs:
        places = []
        for point in pair:
            place = names.index(point) if isinstance(point, str) and point in names else point
            if not isinstance(place, int) or not 0 <= place < len(names):
                raise DataError(f"{source}: flip_pairs: {point!r} is no point; allowed are {', '.join(names)} and "
                                f"0..{len(names) - 1}")  # fmt: skip
            if order[place] != place or place in places:
                raise DataError(f"{source}: flip_pairs: point {point!r} is in two pairs; give each one other point")
            places.append(place)
        order[places[0]], order[places[1]] = places[1], places[0]
    return order
