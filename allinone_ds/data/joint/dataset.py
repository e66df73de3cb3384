"""Datasets of joint groups: one image with labels for several tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from allinone_ds.data.base import Problem, Sample, SampleDataset
from allinone_ds.data.combination import CombinedDataset
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import decoded_once, read_image
from allinone_ds.errors import BrokenSample

JOINT = "joint"
"""Kind of the datasets of joint groups."""


def view_of(sample: Sample, task: str) -> Sample:
    """Return the ordinary sample that one task sees of a sample of a joint group.

    Example:
        >>> view_of({"image": "pixels", "path": "1.png", "index": 0, "targets": {"cls": {"label": 2}}}, "cls")
        {'image': 'pixels', 'path': '1.png', 'index': 0, 'label': 2}
    """
    own = {key: value for key, value in sample.items() if key != "targets"}
    return {**own, **sample["targets"].get(task, {})}


class JointDataset(SampleDataset):
    """Base class of the datasets of joint groups, whose samples have `targets`: {task: the keys of its kind}.

    A subclass needs `kinds`, `classes_of`, `__len__` and `__getitem__`. A task that has no label of an image is missing
    from `targets`; `rows` then says which images have one.

    Attributes:
        kinds: task -> kind of its labels, such as "segmentation".
        classes_of: task -> its class names.

    Example:
        >>> import torch
        >>> from torchvision import tv_tensors
        >>> class Shades(JointDataset):
        ...     kinds = {"light": "classification", "sky": "segmentation"}
        ...     classes_of = {"light": ["day", "night"], "sky": ["sky", "ground"]}
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         image = tv_tensors.Image(torch.full((3, 4, 4), 200 * index, dtype=torch.uint8))
        ...         mask = tv_tensors.Mask(torch.zeros(4, 4, dtype=torch.uint8))
        ...         targets = {"light": {"label": index}, "sky": {"mask": mask}}
        ...         return {"image": image, "path": self.path(index), "index": index, "targets": targets}
        >>> TaskView(Shades(), "light")[1]["label"]
        1
    """

    kind = JOINT
    classes: list[str] = []
    kinds: Mapping[str, str]
    classes_of: Mapping[str, list[str]]

    def rows(self, task: str) -> Sequence[int] | np.ndarray:
        """Return the positions of the samples that have a label of the task; by default all."""
        return range(len(self))

    def read(self, index: int, task: str) -> Sample:
        """Return what one task sees of a sample; by default by reading the whole sample."""
        return view_of(self[index], task)

    def annotations_in_memory(self, task: str) -> bool:
        """Return whether `annotation_of` reads no file, so that all labels of the task are counted."""
        return False

    def annotation_of(self, index: int, task: str) -> Sample:
        """Return what a task learns from a sample, as `SampleDataset.annotation`."""
        sample = self.read(index, task)
        return {**sample, "size": tuple(sample["image"].shape[-2:])}


class TaskView(SampleDataset):
    """What one task sees of a joint group: an ordinary dataset of the images that have a label of it.

    Args:
        dataset: the group's dataset.
        task: one of its tasks.
    """

    def __init__(self, dataset: JointDataset, task: str) -> None:
        self.dataset, self.task = dataset, task
        self.kind, self.classes = dataset.kinds[task], list(dataset.classes_of[task])
        self.name = f"{dataset.name} ({task})"
        self.rows = dataset.rows(task)
        self.in_memory = dataset.annotations_in_memory(task)
        self.opened_from = None

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, index: int) -> str:
        return self.dataset.path(int(self.rows[index]))

    def encoded(self, index: int) -> bytes | None:
        return self.dataset.encoded(int(self.rows[index]))

    def annotation(self, index: int) -> Sample:
        return self.dataset.annotation_of(int(self.rows[index]), self.task)

    def __getitem__(self, index: int) -> Sample:
        return {**self.dataset.read(int(self.rows[index]), self.task), "index": index}


class PairedDataset(JointDataset):
    """Images whose labels come from one ordinary dataset per task.

    Args:
        name: file or folder that error messages name.
        files: the image of each sample; "" for the image of the first task's sample.
        datasets: task -> its dataset.
        places: task -> (N,) index of each sample in the task's dataset; -1: it has no label of the image.
        structural: faults found when the datasets were opened.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        datasets: Mapping[str, SampleDataset],
        places: Mapping[str, np.ndarray],
        structural: Sequence[Problem] = (),
    ) -> None:
        self.name, self.files, self.datasets = name, Texts(files), dict(datasets)
        self.places, self.structural = dict(places), structural
        self.kinds = {task: dataset.kind for task, dataset in datasets.items()}
        self.classes_of = {task: list(dataset.classes) for task, dataset in datasets.items()}

    def __len__(self) -> int:
        return len(self.files)

    def _labelled(self, index: int) -> Iterator[tuple[str, SampleDataset, int]]:
        for task, dataset in self.datasets.items():
            place = int(self.places[task][index])
            if place >= 0:
                yield task, dataset, place

    def path(self, index: int) -> str:
        if self.files[index]:
            return self.files[index]
        _, dataset, place = next(self._labelled(index))
        return dataset.path(place)

    def encoded(self, index: int) -> bytes | None:
        if self.files[index]:
            return super().encoded(index)
        _, dataset, place = next(self._labelled(index))
        return dataset.encoded(place)

    def rows(self, task: str) -> np.ndarray:
        return np.flatnonzero(self.places[task] >= 0)

    def __getitem__(self, index: int) -> Sample:
        return self._read(index, list(self._labelled(index)))

    def read(self, index: int, task: str) -> Sample:
        own = [(name, dataset, place) for name, dataset, place in self._labelled(index) if name == task]
        return view_of(self._read(index, own), task)

    def annotations_in_memory(self, task: str) -> bool:
        return self.datasets[task].in_memory

    def annotation_of(self, index: int, task: str) -> Sample:
        return self.datasets[task].annotation(int(self.places[task][index]))

    def check(self, index: int) -> list[Problem]:
        with decoded_once():
            problems = [problem for _, dataset, place in self._labelled(index) for problem in dataset.check(place)]
            known = {problem.file for problem in problems if problem.level == "error"}
            return problems if known else [*problems, *super().check(index)]

    def _read(self, index: int, labelled: Sequence[tuple[str, SampleDataset, int]]) -> Sample:
        path = self.path(index)
        targets: dict[str, Sample] = {}
        with decoded_once():
            image = read_image(path) if self.files[index] else None
            for task, dataset, place in labelled:
                sample = dataset[place]
                image = sample["image"] if image is None else image
                if sample["image"].shape != image.shape:
                    (height, width), (own_height, own_width) = image.shape[-2:], sample["image"].shape[-2:]
                    raise BrokenSample(
                        sample["path"],
                        f"the image that '{task}' labels is {own_width} x {own_height} (width x height), the joint "
                        f"group's image {path} is {width} x {height}; make them equal",
                    )
                targets[task] = {k: v for k, v in sample.items() if k not in ("image", "path", "index")}
        return {"image": image, "path": path, "index": index, "targets": targets}


class CombinedJointDataset(CombinedDataset, JointDataset):
    """Datasets of one joint group, one after the other; see `CombinedDataset`."""

    datasets: list[Any]

    def __init__(self, datasets: Sequence[JointDataset], *args: Any) -> None:
        super().__init__(datasets, *args)
        self.kinds, self.classes_of = datasets[0].kinds, datasets[0].classes_of

    def rows(self, task: str) -> np.ndarray:
        labelled = np.zeros(len(self), dtype=bool)
        for number, dataset in enumerate(self.datasets):
            own = self._owner == number
            labelled[own] = np.isin(self._index[own], np.asarray(dataset.rows(task)))
        return np.flatnonzero(labelled)

    def read(self, index: int, task: str) -> Sample:
        owner, place = int(self._owner[index]), int(self._index[index])
        return {**self.datasets[owner].read(place, task), "index": index}

    def annotations_in_memory(self, task: str) -> bool:
        return all(dataset.annotations_in_memory(task) for dataset in self.datasets)

    def annotation_of(self, index: int, task: str) -> Sample:
        return self.datasets[self._owner[index]].annotation_of(int(self._index[index]), task)


def stem_of(path: str, folder: str | None) -> str:
    """Return by what the images of two sources are paired: the path below their folder, without suffix.

    Example:
        >>> stem_of("/data/images/a/1.jpg", "/data/images"), stem_of("/other/1.jpg", "/data/images")
        ('a/1', '1')
    """
    stem = os.path.splitext(path)[0]
    if folder is not None:
        relative = os.path.relpath(stem, folder)
        if not relative.startswith(os.pardir):
            return relative
    return os.path.basename(stem)
