"""Classes or identities of images from one folder each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.common.class_names import match_classes, match_identities
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.listing import (
    is_folder,
    is_image,
    require_folder,
    unread_files,
    unused_images,
    walk_files,
)
from allinone_ds.errors import DataError
from allinone_ds.strict import PathText

_SPLITS = frozenset("train training val valid validation dev test testing eval evaluation".split())


class ClassFoldersSource(SourceConfig):
    """One folder per class, named after it; the classes are numbered in the order of their names.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("dog", "cat"):
        ...         Path(root, "train", name).mkdir(parents=True)
        ...     dataset = ClassFoldersSource(format="class_folders", images="train").open(Path(root))
        >>> dataset.classes
        ['cat', 'dog']
        >>> dataset.structural[0].reason
        'class folder contains no image; add images or remove the folder'
    """

    format: Literal["class_folders"]
    images: PathText
    """Folder of the class folders."""
    kind: Literal["classification", "retrieval"] = "classification"
    """What a folder stands for: a class, or an identity, of which a test set may have others than the train set."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        folder = root / self.images
        require_folder(folder, "images")
        found = sorted(e.name for e in os.scandir(folder) if is_folder(e) and not e.name.startswith("."))
        if not found:
            raise DataError(
                f"{folder}: contains no class folder; move the images of each class into a folder of its name"
            )
        splits = [name for name in found if name.lower() in _SPLITS]
        if len(splits) == len(found):
            raise DataError(
                f"{folder}: the class folders are named {', '.join(found)}, as parts of a data set are; "
                f"give the folder of one part, for example {os.path.join(self.images, found[0])}"
            )
        every = walk_files(folder)
        images: dict[str, list[str]] = {name: [] for name in found}
        for file in every:
            name = file.partition(os.sep)[0]
            if is_image(file) and name in images:
                images[name].append(file)
        structural = unused_images(folder, [f for f in every if is_image(f) and os.sep not in f], "in no class folder")
        structural += unread_files(folder, [f for f in every if os.sep in f])
        if len(splits) > 1:
            reason = f"class folders {', '.join(splits)} are named as parts of a data set are; move them if they are"
            structural.append(Problem(str(folder), reason, "warning"))
        for name in [name for name in found if not images[name]]:
            if (folder / name).is_symlink():
                reason = "is a link to a folder without images, or to one that is read already: not used as a class"
                structural.append(Problem(str(folder / name), reason, "warning"))
                found.remove(name)
            else:
                reason = "class folder contains no image; add images or remove the folder"
                structural.append(Problem(str(folder / name), reason))
        names = list(found if classes is None else classes)
        if self.kind == "retrieval":
            names = match_identities(str(folder), found, classes)
        label_of = match_classes(str(folder), found, names)
        files = [file for name in found for file in images[name]]
        labels = [label_of[number] for number, name in enumerate(found) for _ in images[name]]
        return ClassifiedDataset(str(folder), folder, files, labels, names, structural, kind=self.kind)
