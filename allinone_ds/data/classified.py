"""Classification from an image list (`file class-id` a line) or from one folder a class."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from allinone_ds.data.base import (
    ClassNames,
    DataError,
    Problem,
    Sample,
    SampleDataset,
    SourceConfig,
    match_classes,
    need_folder,
    read_classes,
    read_text,
)
from allinone_ds.data.images import compare_files, is_image, list_files, orphans, read_image, walk_images


class ImageListSource(SourceConfig):
    """A text file with `file class-id` a line."""

    format: Literal["image_list"]
    images: str
    """Folder that the list's files are relative to."""
    list: str
    """The text file. Empty lines and lines that start with # are passed over."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name a line; without it the ids are the names."""
    first_id: int = Field(0, ge=0)
    """Id of the first class in the list: 1 where it counts from 1."""


class ClassFoldersSource(SourceConfig):
    """One sub-folder a class; its name is the class name."""

    format: Literal["class_folders"]
    images: str
    """Folder of the class folders."""


class ClassifiedDataset(SampleDataset):
    """Files with one class id each.

    Args:
        name: file or folder that error messages name.
        folder: what `files` are relative to.
        files: file of each sample.
        labels: label of each sample.
        classes: class names by label.
        structural: faults found so far.
        strict: raise a `DataError` for structural faults.
    """

    kind = "classification"

    def __init__(
        self,
        name: str,
        folder: Path,
        files: list[str],
        labels: list[int],
        classes: list[str],
        structural: list[Problem],
        strict: bool,
    ):
        self.name = name
        self.folder = folder
        self.files = files
        self.labels = labels
        self.classes = classes
        self.structural = structural
        self.settle(strict)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        return {"image": read_image(path), "label": self.labels[index], "path": path, "index": index}


def open_image_list(
    source: ImageListSource, root: Path, classes: list[str] | None = None, strict: bool = True
) -> ClassifiedDataset:
    """Opens an image list.

    Args:
        source: folder, list and class names.
        root: what relative paths start at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a missing list; in strict mode also for missing files, lines that are not `file
            class-id`, ids out of range, or an empty list.
    """
    file = root / source.list
    folder = root / source.images
    need_folder(folder, "images")
    names = read_classes(source.classes, root)
    structural: list[Problem] = []
    files: list[str] = []
    ids: list[int] = []
    allowed = len(names) if names is not None else len(classes) if classes is not None else None
    first = source.first_id
    hint = f"ids count from first_id, which is {first}"
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.rsplit(None, 1)
        if len(parts) < 2 or not re.fullmatch("-?[0-9]+", parts[1]):
            structural.append(Problem(str(file), f"line {number}: {line.strip()!r} must be `file class-id`"))
            continue
        identity = int(parts[1])
        if identity < first or (allowed is not None and identity >= first + allowed):
            limits = f"be {first} or more" if allowed is None else f"lie in {first}..{first + allowed - 1}"
            structural.append(Problem(str(file), f"line {number}: class id {identity} must {limits} ({hint})"))
            continue
        files.append(parts[0].strip())
        ids.append(identity - first)
    if names is None and classes is None:
        names = [str(first + i) for i in range(max(ids, default=0) + 1)]
        unused = [names[i] for i in sorted(set(range(len(names))) - set(ids))]
        if unused and ids:
            reason = f"no image has class id {', '.join(unused[:5])}; {hint}; if that is meant, give 'classes'"
            structural.append(Problem(str(file), reason, "warning"))
    if names is not None:
        places = match_classes(str(file), names, classes)
        ids = [places[i] for i in ids]
    structural += compare_files(folder, files)
    final = classes if classes is not None else names
    return ClassifiedDataset(str(file), folder, files, ids, list(final or []), structural, strict)


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
