"""Pascal VOC: XML files of boxes, and label maps in SegmentationClass."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import numpy as np

from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.data.formats.common.masks import color_text
from allinone_ds.data.images import read_color_map, read_label_map
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.init.file_tree import FileTree, nearness, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.endings import is_colored
from allinone_ds.init.layouts.names import find_names, numbered

CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
"""Classes of the label maps of Pascal VOC, in the order of their ids."""

_TRIED = 50  # files of a folder or list that are looked up
_SCANNED = 500  # label maps whose values are read


def find(tree: FileTree) -> list[FoundTask]:
    """Return the tasks of Pascal VOC annotations in a folder: boxes, and masks if there are any."""
    folders = [folder for folder in tree.folders() if _is_annotation(tree, folder)]
    if not folders:
        return []
    parts: dict[str | None, dict[str, Any]] = {}
    notes: list[str] = []
    masks: list[FoundTask] = []
    for folder in folders:
        base = os.path.dirname(folder) if os.path.basename(folder).lower() == "annotations" else folder
        images = _images_folder(tree, folder)
        if images is None:
            notes.append(f"{folder} holds annotations of Pascal VOC, but their images are not here")
            continue
        if base == folder and os.path.commonpath(["/" + images, "/" + base]) != "/" + base:
            base = os.path.commonpath(["/" + images, "/" + base])[1:]
        source = {"format": "voc", "path": tree.reference(base)}
        for key, place, default in (("images", images, "JPEGImages"), ("annotations", folder, "Annotations")):
            name = os.path.relpath(place, base or ".")
            source |= {} if name == default else {key: name}
        lists = _lists(tree, os.path.join(base, "ImageSets", "Main"), folder, ".xml")
        found = {part: {**source, "split": name} for part, name in lists.items()} or {part_of(folder): source}
        repeated = sorted(str(part) for part in found if part in parts)
        if repeated:
            notes.append(f"{folder} is one more folder of annotations; it is not used, add it as a second source")
            continue
        parts |= found
        masks = masks or _masks(tree, base, images, source["path"])
    if not parts:
        tree.remarks += notes
        return []
    train, test, chosen = choose_parts(parts)
    return [FoundTask("detection", "Pascal VOC", train, test, notes=notes + chosen), *masks]


def _is_annotation(tree: FileTree, folder: str) -> bool:
    """Return whether the first XML file of a folder is one of Pascal VOC."""
    name = next((name for name in tree.names_in(folder) if name.lower().endswith(".xml")), None)
    if name is None:
        return False
    try:
        parsed = ElementTree.parse(tree.root / folder / name).getroot()
    except (ElementTree.ParseError, OSError):
        return False
    return parsed.tag == "annotation" and parsed.find("size") is not None


def _images_folder(tree: FileTree, annotations: str) -> str | None:
    """Return the folder with the most images of the same names as the annotations."""
    stems = [os.path.splitext(name)[0] for name in tree.names_in(annotations) if name.lower().endswith(".xml")]
    tried = set(stems[:: max(len(stems) // _TRIED, 1)])
    hits: Counter[str] = Counter()
    for folder in tree.folders():
        hits[folder] = len(tried & {os.path.splitext(name)[0] for name in tree.images_in(folder)})
    best = max(
        hits,
        key=lambda f: (hits[f], part_of(f) == part_of(annotations), f == annotations, nearness(f, annotations)),
    )
    return best if hits[best] else None


def _lists(tree: FileTree, folder: str, files: str, suffix: str) -> dict[str | None, str]:
    """Return {part: name of the list} of the lists whose files are here: train and val, or else trainval."""
    here = {}
    for name in ("train", "val", "trainval", "test"):
        if f"{name}.txt" in tree.names_in(folder):
            try:
                lines = [
                    line.split()[0]
                    for line in read_text(tree.root / folder / f"{name}.txt").splitlines()
                    if line.split()
                ]
            except DataError:
                continue
            tried = lines[:: max(len(lines) // _TRIED, 1)]
            if sum(os.path.join(files, line + suffix) in tree.known for line in tried) > len(tried) / 2:
                here[name] = name
    if "train" in here and "val" in here:
        return {"train": "train", "val": "val"}
    if "trainval" in here:
        return {"train": "trainval", **({"test": "test"} if "test" in here else {})}
    return {name: name for name in here}


def _masks(tree: FileTree, base: str, images: str, path: str) -> list[FoundTask]:
    """Return the segmentation task of the label maps in SegmentationClass."""
    folder = os.path.join(base, "SegmentationClass")
    names = tree.images_in(folder)
    if not names:
        return []
    values: set[int] = set()
    colored = is_colored(str(tree.root / folder / names[0]))
    for name in names[:: max(len(names) // _SCANNED, 1)]:
        file = str(tree.root / folder / name)
        try:
            values |= set(np.unique(read_color_map(file) if colored else read_label_map(file)).tolist())
        except BrokenSample as error:
            tree.remarks.append(str(error))
            return []
    if colored:
        order = {color: number for number, color in enumerate(palette(256))}
        if not values <= order.keys():
            tree.remarks.append(f"the label maps in {folder} have other colours than those of Pascal VOC; list them in "
                                "class_colors")  # fmt: skip
            return []
        values = {order[color] for color in values}
    count = max(values - {255}, default=0) + 1
    if count == 1:
        tree.remarks.append(f"the label maps in {folder} hold no class but 0; read them with the format label_maps")
        return []
    found = find_names(tree, count)
    if found is not None:
        classes, notes = found[1], [f"the class names are those in {found[0]}; check their order"]
    elif count <= len(CLASSES) and os.path.basename(base).startswith("VOC20"):
        classes, notes = CLASSES, ["the classes of the label maps are taken to be those of Pascal VOC"]
    else:
        classes = numbered(range(count))
        notes = ["no file with class names was found; replace the numbered names in `classes`"]
    source: dict[str, Any] = {"format": "voc", "path": path, "kind": "segmentation"}
    if colored:
        source["class_colors"] = list(map(color_text, palette(len(classes))))
        source["ignore_colors"] = [color_text(palette(256)[255])]
    inside = os.path.relpath(images, base or ".")
    source |= {} if inside == "JPEGImages" else {"images": inside}
    lists = _lists(tree, os.path.join(base, "ImageSets", "Segmentation"), folder, ".png")
    train, test, chosen = choose_parts(
        {part: {**source, "split": name} for part, name in lists.items()} or {None: source}
    )
    return [FoundTask("segmentation", "Pascal VOC", train, test, classes, notes + chosen)]


def palette(count: int) -> list[int]:
    """Return the colours of Pascal VOC as numbers, red * 65536 + green * 256 + blue, by id.

    The bits of an id alternate between red, green and blue, from the highest bit of the colour down.

    Example:
        >>> [f"{color:06x}" for color in palette(4)]
        ['000000', '800000', '008000', '808000']
    """
    colors = []
    for number in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append(channels[0] << 16 | channels[1] << 8 | channels[2])
    return colors
