"""Classification from one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from allinone_ds.data.base import (
    Problem,
    SourceConfig,
    match_classes,
    need_folder,
)
from allinone_ds.data.formats.classified_files import ClassifiedDataset
from allinone_ds.data.images import is_image, list_files, orphans, walk_images
from allinone_ds.errors import DataError


class ClassFoldersSource(SourceConfig):
    """One sub-folder a class; its name is the class name."""

    format: Literal["class_folders"]
    images: str
    """Folder of the class folders."""


def open_class_folders(
    source: ClassFoldersSource, root: Path, classes: list[str] | None = None, strict: bool = True
) -> ClassifiedDataset:
    """Opens a folder of class folders; classes are numbered by name.

    Args:
        source: the folder.
        root: what relative paths start at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a missing folder, no class folder, or one that the train set lacks; in strict
            mode also for a class folder without image.
    """
    folder = root / source.images
    need_folder(folder, "images")
    found = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder}: there is no class folder in it; put the images of each class in a folder of its name"
        )
    places = match_classes(str(folder), found, classes)
    structural = orphans(folder, sorted(f for f in list_files(folder) if is_image(f)), "in no class folder")
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(found):
        mine = walk_images(folder / name)
        if not mine:
            structural.append(Problem(str(folder / name), "class folder without an image; add images or remove it"))
        files += [os.path.join(name, file) for file in mine]
        labels += [places[number]] * len(mine)
    final = list(found if classes is None else classes)
    return ClassifiedDataset(str(folder), folder, files, labels, final, structural, strict)
