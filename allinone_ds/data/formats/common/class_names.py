"""Class names: how a config gives them, and how the classes of a test set map to those of its train set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.errors import DataError, printable
from allinone_ds.strict import PathText, did_you_mean

ClassNames = list[str] | PathText
"""Class names in a config: a list in the order of the ids, or a text file with one name per line."""


def read_classes(classes: ClassNames | None, root: Path) -> list[str] | None:
    """Return the class names of a config, or None if it gives none.

    Raises:
        DataError: the text file is missing or empty.
    """
    if not isinstance(classes, str):
        return classes
    file = root / classes
    lines = [line.strip() for line in read_text(file).splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise DataError(f"{file}: contains no class name; write one name per line")
    return names


def match_classes(name: str, own: Sequence[str], train: Sequence[str] | None) -> dict[int, int]:
    """Map the class ids of a dataset to those of its train set by name.

    Args:
        name: the file that error messages name.
        own: class names of this dataset, by id.
        train: class names of the train set, by id; None keeps the dataset's own ids.

    Returns:
        {id in this dataset: id in the train set}

    Raises:
        DataError: a name is used more than once or is not text, or the train set does not have it.
    """
    for class_name in own:
        if printable(class_name) != class_name:
            raise DataError(f"{name}: class name {class_name!r} is not UTF-8; rename it")
        if re.search(r"[\x00-\x1f\x7f]", class_name):
            raise DataError(f"{name}: class name {class_name!r} holds a control character; rename it")
    if len(set(own)) < len(own):
        duplicates = ", ".join(sorted({n for n in own if own.count(n) > 1}))
        raise DataError(f"{name}: class names are used more than once: {duplicates}; give each class a unique name")
    if train is None:
        return {i: i for i in range(len(own))}
    id_of = {n: i for i, n in enumerate(train)}
    unknown = [n for n in own if n not in id_of]
    if unknown:
        raise DataError(f"{name}: class '{unknown[0]}' is not in the train set; {did_you_mean(unknown[0], train)}")
    return {i: id_of[n] for i, n in enumerate(own)}


def sort_key(names: Sequence[str]) -> type[int] | type[str]:
    """Return by what class names are sorted: as numbers if all of them are numbers.

    Example:
        >>> sorted(["10", "9"], key=sort_key(["10", "9"]))
        ['9', '10']
    """
    return int if all(name.isdecimal() for name in names) else str


def match_identities(name: str, own: Sequence[str], train: Sequence[str] | None) -> list[str]:
    """Return the identities of a retrieval set by label: those of its train set first, then those it adds.

    Args:
        name: the file that error messages name.
        own: identities of this dataset.
        train: identities of the train set by label; None for a train set.

    Raises:
        DataError: an identity is no UTF-8 text.

    Example:
        >>> match_identities("test", ["ann", "eve"], ["bob", "eve"])
        ['bob', 'eve', 'ann']
    """
    match_classes(name, own, None)
    return list(dict.fromkeys([*(train or ()), *own]))
