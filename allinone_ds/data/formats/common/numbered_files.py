"""Image files with a row of numbers each: attributes, or the numbers of a regression."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from allinone_ds.data.base import Problem, Sample, SampleDataset
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import read_image

KEYS = {"attributes": "attributes", "regression": "value"}
"""Kind of data -> key of its numbers in a sample."""


class NumberedDataset(SampleDataset):
    """Image files with one number per class, NaN where it is not known.

    Args:
        kind: "attributes" or "regression".
        name: file that error messages name.
        folder: folder that `files` are relative to.
        files: file of each sample.
        values: float64 (number of files, C).
        classes: names of the C numbers.
        structural: faults found when the files were listed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (6, 4)).save(Path(folder, "1.png"))
        ...     dataset = NumberedDataset("regression", "t", Path(folder), ["1.png"], np.array([[4.5]]), ["weight"])
        ...     sample = dataset[0]
        >>> sample["value"]
        tensor([4.5000], dtype=torch.float64)
    """

    in_memory = True

    def __init__(
        self,
        kind: str,
        name: str,
        folder: Path,
        files: Sequence[str],
        values: np.ndarray,
        classes: list[str],
        structural: Sequence[Problem] = (),
    ):
        self.kind, self.name, self.folder, self.files = kind, name, folder, Texts(files)
        self.values, self.classes, self.structural = values, classes, structural

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def annotation(self, index: int) -> Sample:
        dtype = torch.float32 if self.kind == "attributes" else torch.float64
        return {KEYS[self.kind]: torch.from_numpy(self.values[index]).to(dtype)}

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        return {"image": read_image(path), **self.annotation(index), "path": path, "index": index}
