"""Maps of depth, normals, edges or saliency: folders with such names beside a folder of images of equal names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import Any

import numpy as np

from allinone_ds.data.images import read_map
from allinone_ds.errors import BrokenSample
from allinone_ds.init.file_tree import FileTree, common_folder, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts

_WORDS = {
    "depth": {"depth", "depths"},
    "normals": {"normal", "normals"},
    "edges": {"edge", "edges", "boundary", "boundaries", "contours"},
    "saliency": {"saliency", "salient"},
}
_SUFFIXES = (".npy", ".png", ".tif", ".tiff")
_EXAMINED = 8  # maps whose numbers are read
_LARGE = 200.0  # median of whole numbers above which they are millimetres


def find(tree: FileTree) -> list[FoundTask]:
    """Return one task per kind of maps in a folder, or nothing."""
    found: dict[str, dict[str | None, tuple[str, str]]] = defaultdict(dict)  # {kind: {part: (images, maps)}}
    for folder in tree.folders():
        kind, stems = kind_of(folder), _stems(tree.names_in(folder))
        if kind is None or not stems:
            continue
        rated = [
            (nearness(other, folder), other)
            for other in tree.folders()
            if kind_of(other) is None and part_of(other) == part_of(folder) and _share(tree, other, stems) > 0.5
        ]
        if rated:
            part = part_of(folder)
            before = found[kind].get(part, (max(rated)[1], folder))  # folders of one part lie below a common one
            found[kind][part] = common_folder([before[0], max(rated)[1]]), common_folder([before[1], folder])
    tasks = []
    for kind, parts in found.items():
        if any(common_folder(pair) in pair for pair in parts.values()):
            tree.remarks.append(f"images and maps of {kind} lie inside each other; give each a folder of its own")
            continue
        options, notes = _options(tree, kind, [maps for _, maps in parts.values()])
        sources = {
            part: {"format": "dense_maps", "kind": kind, "images": tree.reference(images),
                   "maps": tree.reference(maps), **options}
            for part, (images, maps) in parts.items()
        }  # fmt: skip
        train, test, more = choose_parts(sources)
        tasks.append(FoundTask(kind, f"maps of {kind}", train, test, notes=[*more, *notes]))
    return tasks


def kind_of(folder: str) -> str | None:
    """Return the kind of maps that the innermost telling name in a path stands for, or None.

    Example:
        >>> kind_of("train/depth_maps"), kind_of("normals/val"), kind_of("images/train")
        ('depth', 'normals', None)
    """
    for component in reversed(folder.split(os.sep)):
        words = set(re.findall("[a-z]+", component.lower()))
        for kind, names in _WORDS.items():
            if words & names:
                return kind
    return None


def _stems(names: list[str]) -> set[str]:
    return {os.path.splitext(name)[0] for name in names if name.lower().endswith(_SUFFIXES)}


def _share(tree: FileTree, folder: str, stems: set[str]) -> float:
    """Return the fraction of the images of a folder that have a map."""
    images = {os.path.splitext(name)[0] for name in tree.images_in(folder)}
    return len(images & stems) / len(images) if images else 0.0


def _options(tree: FileTree, kind: str, folders: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return keys of the sources and notes, from the numbers in some maps."""
    files = [file for file in tree.files if file.lower().endswith(_SUFFIXES)]
    files = [file for file in files if any(file.startswith(folder + os.sep) for folder in folders)]
    maps = []
    for file in files[:: max(len(files) // _EXAMINED, 1)][:_EXAMINED]:
        try:
            maps.append(read_map(str(tree.root / file)))
        except BrokenSample as error:
            return {}, [str(error)]
    numbers = np.concatenate([each.ravel()[:: max(each.size // 10_000, 1)] for each in maps])
    if kind == "depth" and np.issubdtype(numbers.dtype, np.integer):
        known = numbers[numbers > 0]
        if known.size and np.median(known) > _LARGE:
            return {"scale": 0.001}, ["the depths are whole numbers, taken for millimetres; else change `scale`"]
        return {}, ["the depths are whole numbers of an unknown unit; set `scale` to the metres of 1"]
    if kind in ("edges", "saliency") and len(np.unique(numbers[numbers > 0])) > 1:
        threshold = float(numbers.max()) // 2
        return {"threshold": threshold}, [f"the maps have several numbers; those above {threshold:g} count"]
    if kind == "normals":
        return {}, ["x should point right, y down and z to the viewer; else list the axes in `negate`"]
    return {}, []
