"""Maps of depth, normals, edges or saliency: folders with such names beside a folder of images of equal names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from allinone_ds.data.images import read_map
from allinone_ds.errors import BrokenSample
from allinone_ds.init.file_tree import FileTree, common_folder, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.endings import PICTURES, endings

_WORDS = {
    "depth": {"depth", "depths", "disparity", "disparities"},
    "normals": {"normal", "normals"},
    "edges": {"edge", "edges", "boundary", "boundaries", "contours"},
    "saliency": {"saliency", "salient"},
}
_SUFFIXES = (".npy", ".png", ".tif", ".tiff")
_EXAMINED = 8  # maps whose numbers are read
_LARGE = 200.0  # median of whole numbers above which they are millimetres


def find(tree: FileTree) -> list[FoundTask]:
    """Return one task per kind of maps in a folder, or nothing."""
    found: dict[str, dict[str | None, list[_Pair]]] = defaultdict(lambda: defaultdict(list))
    for folder in tree.folders():
        kind, names = kind_of(folder), [n for n in tree.names_in(folder) if n.lower().endswith(_SUFFIXES)]
        if kind is None or not names:
            continue
        rated = [
            (_named_pictures(other), nearness(other, folder), other, ends)
            for other in tree.folders()
            if kind_of(other) is None and part_of(other) == part_of(folder) and tree.images_in(other)
            if (ends := endings(tree.images_in(other), names)) is not None
        ]
        if rated:
            _, _, images, ends = max(rated)
            found[kind][part_of(folder)].append(_Pair(images, folder, ends))
    tasks = []
    for kind, parts in found.items():
        pairs = {  # folders of one part lie below a common one
            part: _Pair(
                common_folder(p.images for p in of_part), common_folder(p.maps for p in of_part), of_part[0].ends
            )
            for part, of_part in parts.items()
        }
        if any(common_folder(pair[:2]) in pair[:2] for pair in pairs.values()):
            tree.remarks.append(f"images and maps of {kind} lie inside each other; give each a folder of its own")
            continue
        options, notes = _options(tree, kind, [pair.maps for pair in pairs.values()])
        sources = {}
        for part, pair in pairs.items():
            sources[part] = {"format": "dense_maps", "kind": kind, "images": tree.reference(pair.images),
                             "maps": tree.reference(pair.maps), **options}  # fmt: skip
            suffixes = zip(("image_suffix", "map_suffix"), pair.ends, strict=True)
            sources[part] |= {key: end for key, end in suffixes if end}
        train, test, more = choose_parts(sources)
        tasks.append(FoundTask(kind, f"maps of {kind}", train, test, notes=[*more, *notes]))
    return tasks


class _Pair(NamedTuple):
    images: str
    maps: str
    ends: tuple[str, str]
    """What ends the names of images and of maps."""


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


def _named_pictures(folder: str) -> bool:
    return any(name in PICTURES for name in folder.lower().split(os.sep))


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
    return options_of(kind, maps, any("disparit" in folder.lower() for folder in folders))


def options_of(kind: str, maps: Sequence[np.ndarray], disparities: bool) -> tuple[dict[str, Any], list[str]]:
    """Return keys of the sources and notes, from the numbers in some maps.

    Args:
        kind: kind of the maps.
        maps: their stored numbers.
        disparities: whether they are called disparities.
    """
    numbers = np.concatenate([each.ravel()[:: max(each.size // 10_000, 1)] for each in maps])
    if kind == "depth" and np.issubdtype(numbers.dtype, np.integer):
        known = numbers[numbers > 0]
        if disparities:
            note = "the disparities are taken for those of Cityscapes, (number - 1) / 256 pixels; else change "
            return {"offset": -1, "scale": 1 / 256, "invalid": [0, 1]}, [note + "`offset`, `scale` and `invalid`"]
        if known.size and np.median(known) > _LARGE:
            return {"scale": 0.001}, ["the depths are whole numbers, taken for millimetres; else change `scale`"]
        return {}, ["the depths are whole numbers of an unknown unit; set `scale` to the metres of 1"]
    if kind in ("edges", "saliency") and len(np.unique(numbers[numbers > 0])) > 1:
        threshold = float(numbers.max()) // 2
        return {"threshold": threshold}, [f"the maps have several numbers; those above {threshold:g} count"]
    if kind == "normals":
        return {}, ["x should point right, y down and z to the viewer; else list the axes in `negate`"]
    return {}, []
