"""YOLO: a data.yaml, or folders of images with labels beside them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import Any

import yaml

from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.data.formats.yolo import YoloSource, label_path
from allinone_ds.errors import DataError
from allinone_ds.init.file_tree import FileTree, common_folder, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.names import find_names, numbered

_LINE = re.compile(r"\d+(\s+-?[\d.]+(e-?\d+)?){4,}\s*", re.IGNORECASE)


def find(tree: FileTree) -> list[FoundTask]:
    """Return the detection task of YOLO labels in a folder, or nothing."""
    for file in tree.with_suffix(".yaml", ".yml"):
        tasks = _of_yaml(tree, file)
        if tasks:
            return tasks
    return _of_folders(tree)


def _of_yaml(tree: FileTree, file: str) -> list[FoundTask]:
    try:
        content: Any = yaml.safe_load(read_text(tree.root / file))
    except (DataError, yaml.YAMLError):
        return []
    if not isinstance(content, dict) or not {"names", "nc"} & set(content) or not {"train", "val"} & set(content):
        return []
    parts: dict[str | None, dict[str, Any]] = {}
    failed = []
    for split, part in (("train", "train"), ("val", "val"), ("validation", "val"), ("test", "test")):
        if content.get(split):
            try:
                YoloSource(format="yolo", data=file, split=split).open(tree.root)
            except DataError as error:
                failed.append(f"split '{split}' of {file} is not used: {error}")
                continue
            parts.setdefault(part, {"format": "yolo", "data": tree.reference(file), "split": split})
    if not parts:
        tree.remarks += failed
        return []
    train, test, notes = choose_parts(parts)
    return [FoundTask("detection", "YOLO (data.yaml)", train, test, notes=failed + notes + _outlines(tree))]


def _of_folders(tree: FileTree) -> list[FoundTask]:
    """Return the task of folders of images that have YOLO labels, without a data.yaml."""
    folders: dict[str | None, list[str]] = defaultdict(list)
    largest = -1
    for folder in tree.folders():
        labels = [label_path(os.path.join(folder, name)) for name in tree.images_in(folder)]
        ids = [_class_ids(tree, file) for file in labels if file in tree.known]
        if ids and None not in ids:
            folders[part_of(folder)].append(folder)
            largest = max([largest, *(i for of_file in ids for i in of_file or [])])
    if not folders or largest < 0:
        return []
    if any(len(of_part) > 1 and not common_folder(of_part) for of_part in folders.values()):
        tree.remarks.append(f"YOLO labels in several folders: {', '.join(sum(folders.values(), [])[:5])}")
        return []  # each may be a data set of its own
    parts = {
        part: {"format": "yolo", "images": tree.reference(common_folder(of_part))} for part, of_part in folders.items()
    }
    train, test, notes = choose_parts(parts)
    found = find_names(tree, largest + 1, at_least=True)
    if found is None:
        notes.append("no file with class names was found; replace the numbered names in `classes`")
    else:
        notes.append(f"the class names are those in {found[0]}; check their order")
    classes = numbered(range(largest + 1)) if found is None else found[1]
    return [FoundTask("detection", "YOLO (images and labels)", train, test, classes, notes + _outlines(tree))]


def _class_ids(tree: FileTree, file: str) -> set[int] | None:
    """Return the class ids in a label file; None if it is none."""
    try:
        lines = [line.strip() for line in read_text(tree.root / file).splitlines() if line.strip()]
    except DataError:
        return None
    if not all(_LINE.fullmatch(line) for line in lines):
        return None
    return {int(line.split()[0]) for line in lines}


def _outlines(tree: FileTree) -> list[str]:
    """Return a note if the labels hold outlines, which could also be read as masks."""
    for file in tree.with_suffix(".txt")[:200]:
        ids = _class_ids(tree, file)
        if ids and any(len(line.split()) > 6 for line in read_text(tree.root / file).splitlines()):
            return [
                "the labels are outlines, which are read as the boxes around them; for masks set type: segmentation "
                "of the task and kind: segmentation of its sources"
            ]
    return []
