"""Several sources as one dataset, and the split of a dataset into a train part and a test part."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from allinone_ds.data.base import Expect, Part, Problem, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.class_names import ClassNames, read_classes
from allinone_ds.data.sources import open_source
from allinone_ds.errors import DataError
from allinone_ds.strict import Strict


class Split(Strict):
    """A test part that is taken from the training data (`tasks.NAME.split`).

    An image belongs to the same part as long as its path below `data_root` and the seed stay the same: neither the
    number of ranks nor a resume nor further images change it much. In classification the fraction holds per class.

    Example:
        >>> Split(test=0.2).seed
        0
    """

    test: float = Field(gt=0, lt=1)
    """Fraction of the images that are tested on and not trained on."""
    seed: int = 0
    """Seed of the choice."""


class CombinedSource(SourceConfig):
    """All sources of one task: concatenated, and reduced to one part if there is a split.

    `combine` constructs it from the keys of a task; it is no format of the YAML file.

    Example:
        >>> from allinone_ds.data import ClassFoldersSource
        >>> folders = [ClassFoldersSource(format="class_folders", images=name) for name in ("photos", "drawings")]
        >>> combine(folders, classes=["cat", "dog"], split=Split(test=0.1), part="test").expect.classes
        2
    """

    format: str = "combined"
    sources: list[SourceConfig]
    """The sources, in their order."""
    classes: ClassNames | None = None
    """Class names in the order of the labels; None takes those of the first source."""
    split: Split | None = None
    """How the samples are divided; None uses all of them."""
    part: Literal["train", "test"] = "train"
    """Part of the split that is opened."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> CombinedDataset:
        names = list(classes) if classes is not None else read_classes(self.classes, root)
        datasets: list[SampleDataset] = []
        for source in self.sources:
            try:
                datasets.append(open_source(source, root, names, strict=False))
            except DataError as error:
                if not datasets or classes is not None or self.classes is not None:
                    raise
                raise DataError(f"{error}; to join sources with different classes, list all names in the task's "
                                "'classes'") from None  # fmt: skip
            names = datasets[-1].classes  # those given or of the first source, and the identities that others add
            if datasets[-1].kind != datasets[0].kind:
                raise DataError(
                    f"{datasets[-1].name}: holds {datasets[-1].kind} data, {datasets[0].name} holds "
                    f"{datasets[0].kind} data; give the sources of one task the same kind"
                )
        indices = None
        structural = [problem for dataset in datasets for problem in dataset.structural]
        if self.split is not None:
            indices, warnings = part_of_split(datasets, root, self.split, self.part)
            structural += warnings
        weights = [source.weight for source in self.sources]
        return CombinedDataset(datasets, weights, indices, structural)


def combine(
    sources: SourceConfig | Sequence[SourceConfig],
    classes: ClassNames | None = None,
    split: Split | None = None,
    part: Literal["train", "test"] = "train",
) -> SourceConfig:
    """Return one source for the keys of a task: the source itself if there is nothing to combine.

    Args:
        sources: the source or the sources of the task.
        classes: class names in the order of the labels, or a text file; None takes those of the first source.
        split: how the samples are divided; None uses all of them.
        part: part of the split.
    """
    several = [sources] if isinstance(sources, SourceConfig) else list(sources)
    if len(several) == 1 and classes is None and split is None:
        return several[0]
    count = len(classes) if isinstance(classes, list) else several[0].expect and several[0].expect.classes
    expect = Expect(classes=count) if count else None
    return CombinedSource(sources=several, classes=classes, split=split, part=part, expect=expect)


class CombinedDataset(SampleDataset):
    """Datasets of one kind and equal classes, one after the other.

    Args:
        datasets: the datasets.
        weights: for each dataset, how many times per epoch each of its samples is drawn. With 0.5, half of them are
            drawn in one epoch and the other half in the next.
        indices: for each dataset, the samples that are used, in their order; None uses all of them.
        structural: faults found when the datasets were opened.

    Example:
        >>> from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
        >>> photos = ClassifiedDataset("photos", Path("/photos"), ["1.png", "2.png"], [0, 1], ["cat", "dog"])
        >>> drawings = ClassifiedDataset("drawings", Path("/drawings"), ["1.png"], [1], ["cat", "dog"])
        >>> dataset = CombinedDataset([photos, drawings], weights=[1, 4])
        >>> len(dataset), dataset.path(2), dataset.labels, [part.per_epoch for part in dataset.draw_parts]
        (3, '/drawings/1.png', [0, 1, 1], [2, 4])
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        indices: Sequence[np.ndarray] | None = None,
        structural: Sequence[Problem] = (),
    ):
        self.datasets = list(datasets)
        self.kind, self.classes = datasets[0].kind, datasets[-1].classes
        self.name = ", ".join(dataset.name for dataset in datasets)
        self.structural = structural
        self.in_memory = all(dataset.in_memory for dataset in datasets)
        used = [np.arange(len(d)) for d in datasets] if indices is None else list(indices)
        self._owner = np.repeat(np.arange(len(used)), [len(of_one) for of_one in used])  # (N,), number of the dataset
        self._index = np.concatenate(used).astype(np.int64)  # (N,), index in that dataset
        selection = 0 if indices is None else zlib.crc32(self._owner.tobytes() + self._index.tobytes())
        if all(weight == 1 for weight in weights):
            self._parts: tuple[Part, ...] = (Part(len(self), len(self), selection),)
        else:
            per_epoch = [max(round(w * len(u)), 1) if len(u) else 0 for w, u in zip(weights, used, strict=True)]
            self._parts = tuple(Part(len(u), n, selection) for u, n in zip(used, per_epoch, strict=True))
        if all(dataset.labels is not None for dataset in datasets):
            self.labels = [self.datasets[d].labels[i] for d, i in self._places()]  # type: ignore[index]

    @property
    def draw_parts(self) -> tuple[Part, ...]:
        return self._parts

    def __len__(self) -> int:
        return len(self._index)

    def path(self, index: int) -> str:
        return self.datasets[self._owner[index]].path(int(self._index[index]))

    def encoded(self, index: int) -> bytes | None:
        return self.datasets[self._owner[index]].encoded(int(self._index[index]))

    def annotation(self, index: int) -> Sample:
        return self.datasets[self._owner[index]].annotation(int(self._index[index]))

    def check(self, index: int) -> list[Problem]:
        return self.datasets[self._owner[index]].check(int(self._index[index]))

    def __getitem__(self, index: int) -> Sample:
        sample = self.datasets[self._owner[index]][int(self._index[index])]
        return {**sample, "index": index}

    def random_index(self) -> int:
        if len(self._parts) == 1:
            return super().random_index()
        drawn = int(torch.randint(sum(part.per_epoch for part in self._parts), ()))
        first = 0
        for part in self._parts:
            if drawn < part.per_epoch:
                return first + int(torch.randint(part.samples, ()))
            drawn -= part.per_epoch
            first += part.samples
        raise AssertionError("a drawn number lies within the sum")

    def _places(self) -> list[tuple[int, int]]:
        return list(zip(self._owner.tolist(), self._index.tolist(), strict=True))


def part_of_split(
    datasets: Sequence[SampleDataset], root: Path, split: Split, part: str
) -> tuple[list[np.ndarray], list[Problem]]:
    """Return the indices of one part of each dataset, and warnings about classes that cannot be divided.

    Samples with the same file belong to the same part. Within each dataset, and each class where labels are known
    without decoding an image, the fraction holds up to rounding, and both parts receive at least one image.
    """
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)  # {file: (dataset, index) of its samples}
    strata: dict[tuple[int, int], list[str]] = defaultdict(list)  # {(dataset, class): files}
    for number, dataset in enumerate(datasets):
        labels = dataset.labels
        for index in range(len(dataset)):
            file = dataset.path(index).removeprefix(f"{root}{os.sep}")
            if file not in places:
                strata[number, -1 if labels is None else labels[index]].append(file)
            places[file].append((number, index))
    tested: set[str] = set()
    single: list[str] = []
    for (number, label), files in strata.items():
        if len(files) == 1:
            single.append(datasets[number].name if label < 0 else datasets[number].classes[label])
            continue
        count = min(max(round(split.test * len(files)), 1), len(files) - 1)
        tested.update(sorted(files, key=lambda file: _digest(split.seed, file))[:count])
    name = ", ".join(dataset.name for dataset in datasets)
    if places and not tested:
        raise DataError(f"{name}: split.test = {split.test} of {len(places)} images leaves no image to test on; "
                        "add images, or remove 'split'")  # fmt: skip
    chosen: list[list[int]] = [[] for _ in datasets]
    for file, owners in places.items():
        if (file in tested) == (part == "test"):
            for number, index in owners:
                chosen[number].append(index)
    warnings = []
    if single and part == "train":
        shown = ", ".join(single[:5]) + (", ..." if len(single) > 5 else "")
        reason = f"{len(single)} of the classes or sources have one image, which is trained on and not tested: {shown}"
        warnings.append(Problem(name, reason, "warning"))
    return [np.array(sorted(indices), dtype=np.int64) for indices in chosen], warnings


def _digest(seed: int, file: str) -> bytes:
    """Return bytes that depend on the seed and the file alone, so that all ranks and releases agree."""
    return hashlib.blake2b(f"{seed}:{file}".encode("utf-8", "surrogateescape"), digest_size=16).digest()
