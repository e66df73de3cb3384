"""Image files with one class id each, as the classification formats give them."""

from __future__ import annotations

import os
from pathlib import Path

from allinone_ds.data.base import (
    Problem,
    Sample,
    SampleDataset,
)
from allinone_ds.data.images import read_image


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
