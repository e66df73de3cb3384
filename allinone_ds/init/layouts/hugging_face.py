"""Folders that the `datasets` library reads: `save_to_disk`, parquet files, and images with metadata."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from allinone_ds.data.images import read_label_map
from allinone_ds.errors import BrokenSample
from allinone_ds.init.file_tree import FileTree, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.label_maps import numbering
from allinone_ds.init.layouts.names import numbered

_ROWS = 200  # rows that are looked into
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label")
_BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
_CATEGORY_KEYS = ("category", "categories", "label", "labels", "class", "classes", "class_id", "category_id")
Found = tuple[str, dict[str, Any], list[str] | None, list[str]]
"""Kind, options of the source, class names that the columns do not hold, and notes."""
_MAP_WORDS = ("mask", "label", "seg", "annot", "target")


def find(tree: FileTree) -> list[FoundTask]:
    """Return the task of a folder that `datasets` reads, or nothing."""
    saved = bool({"dataset_dict.json", "state.json"} & set(tree.names_in("")))
    inner = ["", "data", *(name for name in tree.folders_in("") if part_of(name))]
    beside = [os.path.join(folder, name) for folder in inner for name in tree.names_in(folder)]
    parquet = any(file.endswith(".parquet") for file in beside)
    if not saved and not parquet and not any(_is_metadata(tree, file) for file in beside):
        return []
    import datasets

    try:
        loaded = datasets.load_from_disk(str(tree.root)) if saved else datasets.load_dataset(str(tree.root))
    except Exception as error:  # broken files: the library raises many types
        tree.remarks.append(f"the `datasets` library cannot read the folder ({type(error).__name__}: {error})")
        return []
    tables = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    parts: dict[str | None, str] = {}
    for name in tables:
        parts.setdefault(part_of(name), name)
    train, test, notes = choose_parts(parts)
    layout = "saved by save_to_disk" if saved else "parquet files" if parquet else "images with metadata"
    found = _describe(tables[train])
    if found is None:
        columns = ", ".join(tables[train].features)
        tree.remarks.append(f"`datasets` reads the folder, but its columns ({columns}) fit no task")
        return []
    kind, options, classes, more = found
    source = {"format": "datasets", "path": tree.reference("."), "kind": kind, **options}
    sources = [{**source, "split": name} for name in (train, test) if name is not None]
    return [FoundTask(kind, layout, sources[0], sources[1] if test else None, classes, notes + more)]


def _is_metadata(tree: FileTree, file: str) -> bool:
    """Return whether a file holds the metadata of an image folder: its rows name a file each."""
    if os.path.basename(file) not in ("metadata.csv", "metadata.jsonl"):
        return False
    with open(tree.root / file, encoding="utf-8-sig", errors="replace") as opened:
        return "file_name" in opened.readline()


def _describe(table: Any) -> Found | None:
    """Return what the columns are found to be; None if they fit no task."""
    import datasets

    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        return None
    if boxes := detection(table, images):
        return boxes
    if len(images) > 1:
        maps = next((n for n in images if any(word in n.lower() for word in _MAP_WORDS)), images[1])
        return segmentation(table, next(n for n in images if n != maps), maps)
    return _classification(table, images)


def _classification(table: Any, images: list[str]) -> Found | None:
    import datasets

    features = table.features
    possible = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)] or [
        n
        for n in LABEL_COLUMNS
        if n in features and getattr(features[n], "dtype", "") in ("string", "int64", "int32", "int16", "int8")
    ]
    if not possible:
        return None
    notes = [f"column '{possible[0]}' is taken for the class, not {', '.join(possible[1:])}"] if possible[1:] else []
    label = possible[0]
    classes = None
    if not isinstance(features[label], datasets.ClassLabel) and features[label].dtype != "string":
        classes, more = numbered_classes(table[label])
        notes += more
    columns = named_columns(image=(images[0], "image"), label=(label, "label"))
    return "classification", columns, classes, notes + _several(images)


def numbered_classes(ids: Iterable[int]) -> tuple[list[str], list[str]]:
    """Return names for the classes of ids, and a note that they are to be replaced."""
    note = "the dataset holds class ids without names; replace the numbered names in `classes`"
    return numbered(range(max(ids) + 1)), [note]


def detection(table: Any, images: list[str]) -> Found | None:
    """Return what is found if a column holds boxes and their classes, or None.

    Args:
        table: a `datasets.Dataset`, or a table with its methods.
        images: its columns of images, the one of the task first.
    """
    for name, feature in table.features.items():
        inside = _element(feature)
        if isinstance(inside, Mapping):
            box = next((key for key in _BOX_KEYS if key in inside), None)
            category = next((key for key in _CATEGORY_KEYS if key in inside), None)
            if box and category:
                return _boxes(table, images, name, box, category, _element(inside[category]))
    return None


def _boxes(table: Any, images: list[str], objects: str, box: str, category: str, feature: Any) -> Found:
    notes = _several(images)
    columns = named_columns(image=(images[0], "image"), objects=(objects, "objects"), bbox=(box, "bbox"),
                       category=(category, "category"))  # fmt: skip
    cells = [_as_lists(cell, box, category) for cell in table.select_columns(objects)[objects]]
    classes = None
    if not getattr(feature, "names", None):
        found = {value for _, values in cells for value in values}
        if found and all(isinstance(value, int) for value in found):
            classes, more = numbered_classes(found)
            notes += more
        else:
            classes = sorted(map(str, found))
    bbox_format, sure = _box_format(table, images[0], [boxes for boxes, _ in cells[:_ROWS]])
    if not sure:
        notes.append(f"boxes are read as {'x, y, width, height' if bbox_format == 'coco' else 'x1, y1, x2, y2'}; "
                     "look at `allinone-ds preview`, and change bbox_format if they are misplaced")  # fmt: skip
    return "detection", {**columns, **({"bbox_format": "pascal"} if bbox_format == "pascal" else {})}, classes, notes


def segmentation(table: Any, image: str, maps: str) -> Found:
    """Return what is found if a column holds label maps.

    Args:
        table: a `datasets.Dataset`, or a table with its methods.
        image: the column of the images.
        maps: that of the label maps.
    """
    import datasets

    cells = table.cast_column(maps, datasets.Image(decode=False)).select_columns(maps)
    values: set[int] = set()
    for row in range(min(len(cells), _ROWS)):
        try:
            values |= set(np.unique(read_label_map(maps, _bytes(cells[row][maps]))).tolist())
        except (BrokenSample, OSError):
            continue
    options, ids, notes = numbering(values)
    notes.append("the class names are not in the dataset; replace the names in `classes`")
    if len(table) > _ROWS:
        notes.append(f"the values of {_ROWS} of {len(table)} label maps were read; others may hold further classes")
    classes = ["background", "foreground"] if values == {0, 255} else numbered(ids)
    columns = named_columns(image=(image, "image"), label_map=(maps, "label"))
    return "segmentation", {**columns, **options}, classes, notes


def _box_format(table: Any, image: str, boxes: list[list[list[float]]]) -> tuple[str, bool]:
    """Return "coco" or "pascal", and whether the boxes fit only one of them."""
    import datasets

    cells = table.cast_column(image, datasets.Image(decode=False)).select_columns(image)
    fits = {"coco": True, "pascal": True}
    for row, of_image in enumerate(boxes):
        array = np.array(of_image, dtype=np.float64).reshape(-1, 4)
        if not len(array):
            continue
        try:
            with Image.open(io.BytesIO(_bytes(cells[row][image]))) as picture:
                size = np.array(picture.size)
        except OSError:
            continue
        fits["coco"] &= bool((array[:, :2] + array[:, 2:] <= size + 1).all())
        fits["pascal"] &= bool((array[:, 2:] > array[:, :2]).all())
    return ("pascal" if fits["pascal"] and not fits["coco"] else "coco"), fits["coco"] != fits["pascal"]


def named_columns(**roles: tuple[str, str]) -> dict[str, Any]:
    """Return the key `columns` for the columns that differ from the defaults."""
    names = {role: name for role, (name, default) in roles.items() if name != default}
    return {"columns": names} if names else {}


def _several(images: list[str]) -> list[str]:
    return [f"column '{images[0]}' is taken for the image, not {', '.join(images[1:])}"] if images[1:] else []


def _as_lists(cell: Any, box: str, category: str) -> tuple[list[list[float]], list[Any]]:
    if isinstance(cell, Mapping):
        return cell[box] or [], cell[category] or []
    return [item[box] for item in cell or []], [item[category] for item in cell or []]


def _bytes(cell: Any) -> bytes:
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    with open(cell["path"], "rb") as file:
        return file.read()


def _element(feature: Any) -> Any:
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)
