"""Image files with one class or identity each, the dataset of the formats for classification and retrieval."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from allinone_ds.data.base import Problem, Sample, SampleDataset
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import read_image


class ClassifiedDataset(SampleDataset):
    """Image files with one class each, or one identity.

    Args:
        name: file or folder that error messages name.
        folder: folder that `files` are relative to.
        files: file of each sample.
        labels: label of each sample.
        classes: class names by label.
        structural: faults found when the files were listed.
        kind: "classification", or "retrieval" if the labels are identities.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (6, 4)).save(Path(folder, "1.png"))
        ...     sample = ClassifiedDataset("cats", Path(folder), ["1.png"], [0], ["cat"])[0]
        >>> sample["image"].shape, sample["label"]
        (torch.Size([3, 4, 6]), 0)
    """

    in_memory = True

    def __init__(
        self,
        name: str,
        folder: Path,
        files: Sequence[str],
        labels: list[int],
        classes: list[str],
        structural: Sequence[Problem] = (),
        kind: str = "classification",
    ):
        self.kind = kind
        self.name = name
        self.folder = folder
        self.files = Texts(files)
        self.labels: list[int] = labels
        self.classes = list(Texts(classes))  # new objects: each cell of a table would keep a megabyte of it in memory
        self.structural = structural

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def annotation(self, index: int) -> Sample:
        return {"label": self.labels[index]}

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        return {"image": read_image(path), "label": self.labels[index], "path": path, "index": index}
