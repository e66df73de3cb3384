"""Class names in text files beside the data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.errors import DataError
from allinone_ds.init.file_tree import FileTree

_MOST_CLASSES = 255
_NAME_FILES = ("classes", "class_names", "names", "labels", "label_names", "categories", "obj", "predefined_classes")


def find_names(tree: FileTree, count: int, at_least: bool = False) -> tuple[str, list[str]] | None:
    """Return the file, and its lines, of a text file of class names with this number of lines; None if there is none.

    Args:
        tree: the files.
        count: number of classes.
        at_least: whether there may be more names, of classes that do not occur.
    """
    for file in sorted(tree.with_suffix(".txt", ".names"), key=lambda f: (f.count(os.sep), f)):
        stem, suffix = os.path.splitext(os.path.basename(file).lower())
        if stem in _NAME_FILES or suffix == ".names":
            try:
                lines = [line.strip() for line in read_text(tree.root / file).splitlines() if line.strip()]
            except DataError:
                continue
            if all(re.match(r"\d+[\s:,]", line) for line in lines):  # "0 road", "1: sky"
                lines = [re.sub(r"^\d+[\s:,]+", "", line) for line in lines]
            if len(lines) == len(set(lines)) and (len(lines) == count or (at_least and len(lines) > count)):
                return file, lines
    return None


def find_colors(tree: FileTree, colors: set[int]) -> dict[int, str] | None:
    """Return {colour: class name} of a text file that names all these colours; None if there is none.

    A line is `name,red,green,blue`, `red green blue name`, or `name:red,green,blue:...` as CVAT writes it.
    """
    three = r"(\d{1,3})[,\s]+(\d{1,3})[,\s]+(\d{1,3})"
    for file in sorted(tree.with_suffix(".csv", ".txt"), key=lambda f: (f.count(os.sep), f)):
        try:
            lines = [line.strip() for line in read_text(tree.root / file).splitlines() if line.strip()]
        except DataError:
            continue
        names: dict[int, str] = {}
        for line in lines[: _MOST_CLASSES + 1]:
            first = re.match(rf"([^,:\t#]*[^,:\t#\d\s])\s*[,:\t ]\s*{three}(\D|$)", line)
            last = re.match(rf"{three}[,\s]+(\S.*)$", line)
            if first or last:
                name, *channels = first.groups()[:4] if first else (last[4], last[1], last[2], last[3])  # type: ignore[index]
                red, green, blue = (int(channel) for channel in channels)
                names[red << 16 | green << 8 | blue] = name.strip()
        if colors <= names.keys() and len(set(names.values())) == len(names) > 1:
            return names
    return None


def numbered(ids: Iterable[int]) -> list[str]:
    """Return names for classes without names.

    Example:
        >>> numbered([0, 255])
        ['class_0', 'class_255']
    """
    return [f"class_{i}" for i in ids]
