"""Classification from one folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.class_names import match_classes
from allinone_ds.data.formats.classified_files import ClassifiedDataset
from allinone_ds.data.formats.listing import is_image, list_files, require_folder, unused_images, walk_images
from allinone_ds.errors import DataError


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
    images: str
    """Folder of the class folders."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        folder = root / self.images
        require_folder(folder, "images")
        found = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise DataError(
                f"{folder}: contains no class folder; move the images of each class into a folder of its name"
            )
        label_of = match_classes(str(folder), found, classes)
        structural = unused_images(folder, [f for f in list_files(folder) if is_image(f)], "in no class folder")
        files: list[str] = []
        labels: list[int] = []
        for number, name in enumerate(found):
            images = walk_images(folder / name)
            if not images:
                reason = "class folder contains no image; add images or remove the folder"
                structural.append(Problem(str(folder / name), reason))
            files += [os.path.join(name, file) for file in images]
            labels += [label_of[number]] * len(images)
        return ClassifiedDataset(
            str(folder), folder, files, labels, list(found if classes is None else classes), structural
        )
