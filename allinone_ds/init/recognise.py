"""From a folder to the tasks that it holds data for."""

from __future__ import annotations

import re
from pathlib import Path

from allinone_ds.errors import DataError
from allinone_ds.init.file_tree import FileTree, part_of
from allinone_ds.init.found_task import FoundTask
from allinone_ds.init.layouts import (
    attributes,
    classification,
    coco,
    dense_maps,
    hugging_face,
    label_maps,
    tables,
    tar_files,
    voc,
    yolo,
)

FINDERS = {
    "`datasets`: a folder of save_to_disk, parquet files, or images with metadata.csv or metadata.jsonl that names "
    "each file in `file_name`": hugging_face.find,
    "tar files of the webdataset format: members 1.jpg and 1.cls, 1.json, 1.txt or 1.seg.png, one after another, are a "
    "sample": tar_files.find,
    "YOLO: a data.yaml with names, train and val, or folders images and labels with `class x y width height` per line":
        yolo.find,
    "Pascal VOC: XML files in Annotations and images in JPEGImages, lists in ImageSets": voc.find,
    "COCO: a json with the lists images, annotations (with bbox, and masks or keypoints if there are any) and "
    "categories, and the images": coco.find,
    "label maps: a folder of images and a folder of png files of the same names, whose pixels are class ids, or whose "
    "colours are classes": label_maps.find,
    "maps: a folder of images, and folders called depth, disparity, normals, edges or saliency with a npy, png or tiff "
    "file per image, of the same name": dense_maps.find,
    "attributes: a text file with the names of the attributes in a line, and `file` and 1, 0 or -1 of each in the "
    "others, as in CelebA": attributes.find,
    "a list: a txt file with `file class-id` per line, and the images": classification.find_lists,
    "a table: a csv file with a column of files, and columns of classes, identities, attributes (0 and 1) or numbers, "
    "or the corners of a box per row; and the images": tables.find,
    "class folders: one folder of images per class or identity, also below train/ and test/":
        classification.find_class_folders,
}  # fmt: skip
"""{what a layout looks like: its recogniser}, in the order in which they are tried."""

_PLACES = ("images", "annotations", "label_maps", "maps", "list", "table", "data", "shards")
"""Keys of sources that name files and folders."""
_COMPONENTS = frozenset({"images", "image", "img", "labels", "masks", "annotations", "imagesets", "jpegimages"})


def recognise(root: Path, name: str = "") -> dict[str, FoundTask]:
    """Return the tasks for which a folder holds data, by a name for each.

    A folder that is no data set itself, but contains several, gives one task per data set.

    Args:
        root: the folder.
        name: the folder relative to `data_root`, "" if they are the same.

    Raises:
        DataError: the folder is missing or nothing in it is recognised; the message says what is there and what each
            layout looks like.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; give the folder of a data set")
    tree = FileTree(root, name)
    found = _find(tree)
    inner = [f for f in tree.folders_in("") if part_of(f) is None and f.lower() not in _COMPONENTS]
    if not found or any(_inside_one_folder(task, tree) for task in found):
        below = [(child, FileTree(root / child, tree.reference(child))) for child in inner]
        of_child = {child: tasks for child, subtree in below if (tasks := _find(subtree))}
        if len(of_child) > 1 or (of_child and not found):
            named: dict[str, FoundTask] = {}
            for child, tasks in of_child.items():
                named |= _named(child, tasks)
            unused = [child for child, subtree in below if child not in of_child and subtree.files]
            if unused:
                next(iter(named.values())).notes.append(f"nothing was recognised in {', '.join(unused)}")
            return named
    if not found:
        raise DataError(_nothing(tree))
    return _named(root.resolve().name, found)


def _find(tree: FileTree) -> list[FoundTask]:
    """Return the tasks of the first layout that fits, and those that others have for the same images."""
    tasks: list[FoundTask] = []
    for finder in FINDERS.values():
        if not tasks:
            tasks = finder(tree)
        elif finder in _ALSO:
            kinds, images = {task.kind for task in tasks}, {task.images for task in tasks}
            more = [task for task in finder(tree) if task.kind not in kinds]
            if finder in (tables.find, attributes.find):  # a table may list the images of another data set
                more = [task for task in more if task.images is not None and task.images in images]
            tasks = [*tasks, *more]
    return tasks


_ALSO = (label_maps.find, dense_maps.find, attributes.find, tables.find)
"""Recognisers whose labels may be those of images that also have others."""


def _inside_one_folder(task: FoundTask, tree: FileTree) -> bool:
    """Return whether all files of a task lie in one folder of the tree, beside which there may be other data."""
    used: set[str] = set()
    for source in (task.train, task.test or {}):
        given = [source[key] for key in (("path",) if "path" in source else _PLACES) if key in source]
        for value in (one for several in given for one in (several if isinstance(several, list) else [several])):
            relative = Path(value).relative_to(tree.name) if tree.name else Path(value)
            used.add(relative.parts[0] if relative.parts else ".")
    return len(used) == 1 and used <= set(tree.folders_in(""))


def _named(folder: str, tasks: list[FoundTask]) -> dict[str, FoundTask]:
    name = re.sub(r"\W+", "_", folder).strip("_") or "data"
    return {name if len(tasks) == 1 else f"{name}_{task.kind}": task for task in tasks}


def _nothing(tree: FileTree) -> str:
    lines = [f"{tree.root}: no data set is recognised; it holds {len(tree.files)} files: {tree.suffixes()}"]
    lines += [f"  {remark}" for remark in tree.remarks]
    lines += ["What is recognised:", *(f"  {description}" for description in FINDERS)]
    return "\n".join([*lines, "To write the file by hand, see docs/data-formats.md"])
