"""Classification: lists of `file class-id`, and one folder per class."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

from allinone_ds.data.formats.common.listing import is_image, read_text
from allinone_ds.errors import DataError
from allinone_ds.init.file_tree import FileTree, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.names import find_names

_TRIED = 50  # files of a list that are looked up
_NOT_CLASSES = frozenset({"images", "image", "img", "imgs", "labels", "label", "masks", "mask", "annotations", "gt"})


def find_lists(tree: FileTree) -> list[FoundTask]:
    """Return the task of text files with `file class-id` per line, or nothing."""
    parts: dict[str | None, tuple[dict[str, Any], list[int]]] = {}
    notes = []
    for file in tree.with_suffix(".txt", ".lst"):
        rows = [line.rsplit(None, 1) for line in lines_of(tree, file) if not line.startswith("#")]
        if not rows or not all(len(r) == 2 and is_image(r[0]) for r in rows):
            continue
        if parts_of_list(tree, file, {row[0] for row in rows}):
            notes.append(f"{file} divides images into parts; it lists no classes")
            continue
        if not all(re.fullmatch(r"\d+", row[1]) for row in rows):
            notes.append(
                f"{file} lists images with class names; a list has ids, a csv file with a header may have names"
            )
            continue
        if re.search("identit|person", os.path.basename(file).lower()):
            notes.append(f"{file} lists identities; write a line `image identity` above it to read it with "
                         "format: image_table, kind: retrieval, label_column: identity, delimiter: ' '")  # fmt: skip
            continue
        folder = folder_of(tree, [row[0] for row in rows], os.path.dirname(file))
        if folder is None:
            notes.append(f"{file} is a list of images and class ids, but its images are not here")
            continue
        if part_of(file) in parts:
            notes.append(f"{file} is one more list of images and class ids; it is not used")
            continue
        source: dict[str, Any] = {
            "format": "image_list",
            "images": tree.reference(folder),
            "list": tree.reference(file),
        }
        parts[part_of(file)] = source, [int(row[1]) for row in rows]
    if not parts:
        tree.remarks += notes
        return []
    ids = sorted({i for _, of_list in parts.values() for i in of_list})
    (train, _), test, chosen = choose_parts(parts)
    if ids[0] > 0:
        notes.append(f"the smallest class id is {ids[0]}, which is taken for the first class")
        for source in [train, *([test[0]] if test else [])]:
            source["first_id"] = ids[0]
    count = ids[-1] - ids[0] + 1
    if count > len(ids):
        notes.append(
            f"only {len(ids)} of the {count} ids from {ids[0]} to {ids[-1]} occur; the others count as classes"
        )
    found = find_names(tree, count)
    if found is not None:
        notes.append(f"the class names are those in {found[0]}; check their order")
    else:
        notes.append("no file with class names was found; the ids are the names, list them in `classes`")
    classes = found[1] if found else [str(i) for i in range(ids[0], ids[-1] + 1)]
    return [FoundTask("classification", "list of files", train, test[0] if test else None, classes, notes + chosen)]


def find_class_folders(tree: FileTree) -> list[FoundTask]:
    """Return the task of folders with one folder per class, or nothing."""
    bases = [base for base in _bases(tree) if _parts(tree, base)[0]]
    if len(bases) != 1:
        return []
    parts, notes = _parts(tree, bases[0])
    sources = {part: {"format": "class_folders", "images": tree.reference(folder)} for part, folder in parts.items()}
    train, test, chosen = choose_parts(sources)
    names = {part: set(tree.folders_in(folder)) for part, folder in parts.items()}
    if test is not None and not any(names[part] & names["train"] for part in names if part != "train"):
        notes.append("train and test have no folder in common, so the folders are taken for identities (retrieval)")
        for source in (train, test):
            source["kind"] = "retrieval"
        return [FoundTask("retrieval", "folders of identities", train, test, notes=notes + chosen)]
    return [FoundTask("classification", "class folders", train, test, notes=notes + chosen)]


def _bases(tree: FileTree) -> list[str]:
    """Return the folders that may contain class folders or the folders of parts, of the first depth with any."""
    level = [""]
    while level and not any(_parts(tree, folder)[0] for folder in level):
        level = [os.path.join(folder, name) for folder in level for name in tree.folders_in(folder)]
    return level


def _parts(tree: FileTree, base: str) -> tuple[dict[str | None, str], list[str]]:
    """Return the folders that contain class folders by part, and notes."""
    inner = tree.folders_in(base)
    parts: dict[str | None, str] = {}
    notes = []
    if inner and all(part_of(name) for name in inner):
        for name in inner:
            if _are_classes(tree, os.path.join(base, name)):
                parts.setdefault(part_of(name), os.path.join(base, name))
            else:
                notes.append(f"{os.path.join(base, name)} has no folder per class and is not used")
    elif _are_classes(tree, base):
        parts[None] = base
        called = [name for name in inner if part_of(name)]
        if called:
            notes.append(f"the folders {', '.join(called)} count as classes, since other folders lie beside them")
    return parts, notes


def _are_classes(tree: FileTree, folder: str) -> bool:
    """Return whether the folders in a folder are classes: two or more, with images, and with names of their own."""
    names = tree.folders_in(folder)
    if len(names) < 2 or {name.lower() for name in names} <= _NOT_CLASSES:
        return False
    return all(tree.images_in(os.path.join(folder, name)) for name in names)


def parts_of_list(tree: FileTree, file: str, images: set[str]) -> list[str]:
    """Return the parts in a file that gives the part of each image, `file part` or `file,part`; none if it does not."""
    rows = [re.split(r"[,\s]+", line) for line in lines_of(tree, file)]
    rows = [row for row in rows if len(row) == 2 and row[0] in images]
    parts = {row[1] for row in rows}
    if not re.search("partition|split|subset", os.path.basename(file).lower()) or 2 * len(rows) < len(images):
        return []
    return sorted(parts) if len(parts) <= 5 else []


def lines_of(tree: FileTree, file: str) -> list[str]:
    """Return the lines of a text file that are not empty, none if it is no text."""
    try:
        return [line.strip() for line in read_text(tree.root / file).splitlines() if line.strip()]
    except DataError:
        return []


def folder_of(tree: FileTree, names: list[str], beside: str, suffix: str = "") -> str | None:
    """Return the folder that most of the files are relative to; None if fewer than half of them exist."""
    names = names[:: max(len(names) // _TRIED, 1)]
    hits: Counter[str] = Counter()
    for folder in {beside, os.path.dirname(beside), "", *tree.folders()}:
        hits[folder] = sum(os.path.normpath(os.path.join(folder, name + suffix)) in tree.known for name in names)
    best = max(hits, key=lambda folder: (hits[folder], folder == beside, nearness(folder, beside)))
    return best if 2 * hits[best] > len(names) else None
