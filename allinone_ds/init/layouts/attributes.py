"""Attributes as CelebA stores them: a text file with names in one line, and a file and its values in each other one."""

from __future__ import annotations

import os
from typing import Any

from allinone_ds.data.formats.common.listing import is_image
from allinone_ds.init.file_tree import FileTree, Part, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.classification import folder_of, lines_of, parts_of_list

_VALUES = frozenset({"1", "0", "-1"})
_CELEBA: dict[str, Part] = {"0": "train", "1": "val", "2": "test"}
_SCANNED = 1000  # rows whose values are read

Source = dict[str, Any]


def find(tree: FileTree) -> list[FoundTask]:
    """Return the task of a text file of attributes, or nothing."""
    for file in tree.with_suffix(".txt"):
        lines = lines_of(tree, file)
        body = lines[1:] if lines and lines[0].isdecimal() else lines  # CelebA begins with the number of rows
        names, rows = (body[0].split(), [line.split() for line in body[1:]]) if len(body) > 1 else ([], [])
        if len(names) < 2 or not all(len(row) == len(names) + 1 and is_image(row[0]) for row in rows):
            continue
        values = {value for row in rows[:: max(len(rows) // _SCANNED, 1)] for value in row[1:]}
        if not values <= _VALUES:
            tree.remarks.append(f"{file} lists images with {len(names)} numbers that are no attributes; it is not used")
            continue
        folder = folder_of(tree, [row[0] for row in rows], os.path.dirname(file))
        if folder is None:
            tree.remarks.append(f"{file} lists attributes of images, but the images are not here")
            continue
        source: dict[str, Any] = {"format": "image_table", "kind": "attributes", "images": tree.reference(folder),
                                  "table": tree.reference(file), "delimiter": " "}  # fmt: skip
        notes = []
        if "-1" in values and "0" not in values:
            source["absent"] = -1
            notes.append(f"{file}: -1 is read as an attribute that an image does not have")
        train, test, more = _divided(tree, source, {row[0] for row in rows})
        return [FoundTask("attributes", "text file of attributes", train, test, notes=notes + more)]
    return []


def _divided(tree: FileTree, source: dict[str, Any], files: set[str]) -> tuple[Source, Source | None, list[str]]:
    """Return the sources of the training and the test images, which a file may divide, and notes."""
    for file in tree.with_suffix(".txt", ".csv"):
        parts: dict[str | None, Source] = {}
        for name in parts_of_list(tree, file, files):
            part = {"partition": tree.reference(file), "part": int(name) if name.isdecimal() else name}
            parts[_CELEBA.get(name, part_of(name))] = {**source, **part}
        if "train" in parts:
            return choose_parts(parts)
    return source, None, []
