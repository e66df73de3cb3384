"""What the columns of a table hold beside classes: attributes, numbers, identities."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from allinone_ds.data.formats.common.tables import MISSING

_IDENTITIES = ("identity", "identityid", "person", "personid", "pid", "subject", "subjectid", "individual",
               "individualid", "instance", "instanceid", "product", "productid", "landmarkid", "whaleid")  # fmt: skip
_NO_NUMBERS = ("", "unnamed0", "index", "id", "fold", "split", "width", "height", "w", "h", "x", "y", "xcenter",
               "ycenter", "lat", "lon", "latitude", "longitude", "timestamp", "confidence")  # fmt: skip
_NUMBERS = ("age", "price", "weight", "count", "rating", "value", "number", "quantity", "mass", "volume", "bmi",
            "temperature", "distance", "angle", "pawpularity", "year")  # fmt: skip
_FLAGS = ("0", "1", "-1", "0.0", "1.0", "-1.0")

Rows = Sequence[Mapping[str, str]]


def attribute_columns(rows: Rows, columns: Sequence[str], taken: Collection[str | None]) -> tuple[list[str], int]:
    """Return the columns of attributes, and the value of one that an image does not have, 0 or -1.

    Example:
        >>> attribute_columns([{"hat": "1", "old": "-1"}, {"hat": "-1", "old": ""}], ["hat", "old"], [])
        (['hat', 'old'], -1)
    """
    found, values = [], set()
    for column in columns:
        own = {row[column] for row in rows if row[column].lower() not in MISSING}
        if column not in taken and own and own <= set(_FLAGS):
            found.append(column)
            values |= {float(value) for value in own}
    return found, -1 if -1.0 in values and 0.0 not in values else 0


def number_columns(rows: Rows, columns: Sequence[str], taken: Collection[str | None]) -> list[str]:
    """Return the columns of numbers that could be predicted: with fractions, or with a telling name.

    Example:
        >>> number_columns([{"age": "3", "id": "7"}, {"age": "4", "id": "8"}], ["age", "id"], [])
        ['age']
    """
    found = []
    for column in columns:
        values = [row[column] for row in rows if row[column].lower() not in MISSING]
        plain = re.sub(r"[^a-z0-9]", "", column.lower())
        if column in taken or plain in _NO_NUMBERS or len(set(values)) < 2 or not all(map(_is_number, values)):
            continue
        if plain in _NUMBERS or any(float(value) % 1 for value in values):
            found.append(column)
    return found


def identity_column(rows: Rows, columns: Sequence[str]) -> str | None:
    """Return the column of identities, some of which have several images; None if there is none.

    Example:
        >>> identity_column([{"pid": "a"}, {"pid": "a"}], ["pid"])
        'pid'
    """
    for column in columns:
        if re.sub(r"[^a-z0-9]", "", column.lower()) in _IDENTITIES:
            if len({row[column] for row in rows}) < len(rows):
                return column
    return None


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
