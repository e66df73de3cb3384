"""Label maps: a folder of images and a folder of files with one channel of class ids, or with colours."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import numpy as np

from allinone_ds.data.base import IGNORE
from allinone_ds.data.formats.common.masks import color_text
from allinone_ds.data.images import read_color_map, read_label_map
from allinone_ds.errors import BrokenSample
from allinone_ds.init.file_tree import FileTree, common_folder, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.dense_maps import kind_of
from allinone_ds.init.layouts.endings import PICTURES, endings, is_colored, stem
from allinone_ds.init.layouts.names import find_colors, find_names, numbered

_EXAMINED = 5  # files of a folder by which it counts as one of label maps
_MOST_IDS = 64  # different values in a small file, above which it is a picture
_SCANNED = 1000  # label maps whose values are read
_OBJECTS = ("object", "instance")  # in the names of folders whose label maps number objects
_NO_CLASS = ("void", "unlabeled", "unlabelled", "ignore", "ignored", "unknown")
_WORDS = ("mask", "label", "annot", "gt", "seg", "truth", "target")


def find(tree: FileTree) -> list[FoundTask]:
    """Return the segmentation task of the pairs of folders in a folder, or nothing."""
    pairs = _pairs(tree)
    groups: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
    for images, maps in pairs:
        groups[part_of(images) or part_of(maps)].append((images, maps))
    if not groups:
        return []
    sources: dict[str | None, dict[str, Any]] = {}
    stored: list[str] = []
    for part, found in groups.items():
        images, maps = (common_folder(folders) for folders in zip(*found, strict=True))
        if common_folder([images, maps]) in (images, maps):
            where = f"{images or '.'}, {maps or '.'}"
            tree.remarks.append(f"label maps and images lie inside each other ({where}); give each a folder of its own")
            return []
        ends = endings(tree.images_in(found[0][0]), tree.images_in(found[0][1])) or ("", "")
        sources[part] = {"format": "label_maps", "images": tree.reference(images), "label_maps": tree.reference(maps)}
        sources[part] |= {k: v for k, v in zip(("image_suffix", "label_map_suffix"), ends, strict=True) if v}
        stored += [
            os.path.join(m, name) for _, m in found for name in tree.images_in(m) if stem(name).endswith(ends[1])
        ]
    train, test, notes = choose_parts(sources)
    options, classes, more = _classes(tree, stored)
    for source in (train, test):
        if source is not None:
            source.update(options)
    return [FoundTask("segmentation", "label maps", train, test, classes, notes + more)]


def _pairs(tree: FileTree) -> list[tuple[str, str]]:
    """Return (folder of images, folder of their label maps) of all folders that belong together."""
    folders = [folder for folder in tree.folders() if tree.images_in(folder)]
    maps = [folder for folder in folders if _holds_label_maps(tree, folder)]
    pairs: dict[str, tuple[bool, str]] = {}
    for folder in maps:
        rated = []
        for other in folders:
            if other in maps or part_of(other) != part_of(folder) or kind_of(other) is not None:
                continue
            ends = endings(tree.images_in(other), tree.images_in(folder))
            if ends is not None:
                shared = nearness(other, folder)
                same_name = os.path.basename(other) == os.path.basename(folder)
                rated.append((same_name, shared, other))
        if rated:
            images = max(rated)[2]
            found = any(word in os.path.basename(folder).lower() for word in _OBJECTS), folder
            pairs[images] = min(pairs.get(images, found), found)  # SegmentationClass, not SegmentationObject
    return [(images, folder) for images, (_, folder) in pairs.items()]


def _holds_label_maps(tree: FileTree, folder: str) -> bool:
    """Return whether the files of a folder have one channel of few values, or a few values and a telling name."""
    names = [
        name for name in tree.images_in(folder) if name.lower().endswith((".png", ".tif", ".tiff", ".bmp", ".gif"))
    ]
    told = any(word in folder.lower() for word in _WORDS)
    if not names:
        if told and tree.images_in(folder):
            tree.remarks.append(f"{folder} may hold label maps, but JPEG changes their values; write them as png")
        return False
    if any(name in PICTURES for name in folder.lower().split(os.sep)) or kind_of(folder) is not None:
        return False
    for name in names[:: max(len(names) // _EXAMINED, 1)][:_EXAMINED]:
        path = str(tree.root / folder / name)
        try:
            colored = is_colored(path)
            values = len(np.unique(read_color_map(path) if colored else read_label_map(path)))
        except (OSError, BrokenSample):
            return False
        if colored and told and values > _MOST_IDS:
            tree.remarks.append(
                f"{folder} may hold label maps, but {name} has {values} colours; a label map has one per class, and is "
                "written without smoothing and without JPEG"
            )
        if values > (256 if told and not colored else _MOST_IDS) or (colored and not told):
            return False
    return True


def _classes(tree: FileTree, files: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return options of the sources, class names, and notes, from the values in the label maps."""
    notes = []
    read = files[:: max(len(files) // _SCANNED, 1)]
    values: set[int] = set()
    colored = any(is_colored(str(tree.root / file)) for file in read[:_EXAMINED])
    for file in read:
        path = str(tree.root / file)
        try:
            values |= set(np.unique(read_color_map(path) if colored else read_label_map(path)).tolist())
        except BrokenSample as error:
            notes.append(str(error))
    if len(read) < len(files):
        notes.append(f"the values of {len(read)} of {len(files)} label maps were read; others may hold further classes")
    if colored:
        options, classes, more = _colors(tree, values)
        return options, classes, notes + more
    options, ids, more = numbering(values)
    notes += more
    if values == {0, 255}:
        return options, ["background", "foreground"], notes
    found = find_names(tree, len(ids))
    if found is not None:
        return options, found[1], [*notes, f"the class names are those in {found[0]}; check their order"]
    notes.append("no file with class names was found; replace the numbered names in `classes`")
    return options, numbered(ids), notes


def _colors(tree: FileTree, values: set[int]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return options of the sources, class names, and notes, for the colours in label maps."""
    found = find_colors(tree, values)
    if found is None:
        colors = sorted(values)[:IGNORE]
        note = f"the label maps have {len(values)} colours, taken for classes; replace their names in `classes`"
        return {"class_colors": list(map(color_text, colors))}, [f"color_{c:06x}" for c in colors], [note]
    name_of, notes = found, []
    ignored = [color for color, name in name_of.items() if name.lower() in _NO_CLASS]
    classes = {color: name for color, name in name_of.items() if color not in ignored}
    options: dict[str, Any] = {"class_colors": list(map(color_text, classes))}
    if ignored:
        options["ignore_colors"] = list(map(color_text, ignored))
        notes.append(f"pixels of {', '.join(name_of[color] for color in ignored)} are read as pixels without a class")
    absent = [name for color, name in classes.items() if color not in values]
    if absent:
        notes.append(f"no label map holds {', '.join(absent)}; they count as classes")
    return options, list(classes.values()), notes


def numbering(values: set[int]) -> tuple[dict[str, Any], list[int], list[str]]:
    """Return options of a source, the ids of the classes in their order, and notes, for the values in label maps.

    Example:
        >>> numbering({0, 255})[:2], numbering({1, 2, 3})[:2], numbering({0, 2, 255})[:2]
        (({'class_ids': [0, 255]}, [0, 255]), ({'first_id': 1}, [1, 2, 3]), ({}, [0, 1, 2]))
    """
    ids = sorted(values - {255})
    notes = []
    if values == {0, 255}:
        notes.append(
            "the label maps hold 0 and 255: these are two classes, background and foreground; 255 is not ignored"
        )
        return {"class_ids": [0, 255]}, [0, 255], notes
    if 255 in values:
        notes.append("pixels of 255 are read as pixels without a class")
    if not ids:
        return {}, [0], [*notes, "the label maps hold no class"]
    if ids[0] > 0 and ids == list(range(ids[0], ids[-1] + 1)):
        return {"first_id": ids[0]}, ids, notes
    if ids[-1] + 1 > 2 * len(ids) + 8:
        notes.append(f"the class ids have gaps: {', '.join(map(str, ids[:12]))}{', ...' if len(ids) > 12 else ''}")
        return {"class_ids": ids}, ids, notes
    absent = sorted(set(range(ids[-1] + 1)) - set(ids))
    if absent:
        notes.append(f"no label map holds {', '.join(map(str, absent))}; they count as classes")
    return {}, list(range(ids[-1] + 1)), notes
