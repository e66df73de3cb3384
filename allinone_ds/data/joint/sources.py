"""Sources of joint groups: one image set, and for each task where its labels come from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, WrapValidator, model_validator

from allinone_ds.data.base import Problem, SampleDataset, SourceConfig
from allinone_ds.data.combination import Split, part_of_split
from allinone_ds.data.formats.common.class_names import ClassNames, read_classes
from allinone_ds.data.formats.common.listing import read_text, require_folder, walk_images_or_arrays
from allinone_ds.data.formats.own import OwnSource
from allinone_ds.data.formats.script import ScriptSource
from allinone_ds.data.joint.dataset import CombinedJointDataset, JointDataset, PairedDataset, TaskView, stem_of
from allinone_ds.data.sources import SOURCE_CLASSES, Source, open_source, source_type
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText, did_you_mean

Names = Mapping[str, Sequence[str]]
"""Task -> its class names."""

_FORMATS = {cls.model_fields["format"].annotation.__args__[0]: cls for cls in SOURCE_CLASSES}  # type: ignore[union-attr]


class PairedSource(SourceConfig):
    """One image set with a source of labels per task.

    A source of labels may be of any format. Without `images` of its own it has those of the group. The images of two
    sources belong together if their paths below their folders are equal, suffixes aside; without folders, if their
    names are, or, where they have no files, if their positions are. Samples of tar files do if tar file and name are.

    Example:
        >>> maps = {"format": "label_maps", "label_maps": "maps", "classes": ["road", "sky"]}
        >>> PairedSource(format="joint", images="photos", labels={"seg": maps}).labels["seg"].images
        'photos'
    """

    format: Literal["joint"]
    images: PathText | None = None
    """Folder of the images; null: those of the sources of labels."""
    image_list: PathText | None = None
    """Text file with the name of an image per line, relative to `images`, with or without suffix. Only these images are
    used, and labels of others are left out."""
    labels: dict[str, Source] = Field(min_length=1)
    """Task -> source of its labels; null instead of a source drops that of a base."""
    partial: bool = False
    """Allow images that lack the labels of some tasks. They train and evaluate the tasks that they have labels of."""

    @model_validator(mode="after")
    def _has_images_to_list(self) -> PairedSource:
        if self.image_list is not None and self.images is None:
            raise ConfigError("'image_list' names images below 'images', which is not set; set it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _share_images(cls, content: Any) -> Any:
        """Give the group's images to the sources of labels that need images and name none, and drop null labels."""
        if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
            return content
        labels = {}
        for task, label in content["labels"].items():
            if label is None:
                continue
            takes = content.get("images") and isinstance(label, dict) and "images" not in label
            takes = takes and label.get("format") in _FORMATS
            fields = _FORMATS[label["format"]].model_fields if takes else {}
            own = "images" in fields and "path" not in fields  # that of voc is relative to its `path`
            labels[task] = {**label, "images": content["images"]} if own else label
        return {**content, "labels": labels}

    def open(self, root: Path, classes: Names | None = None) -> JointDataset:  # type: ignore[override]
        names = classes or {}
        datasets = {t: open_source(s, root, _list(names.get(t)), strict=False) for t, s in self.labels.items()}
        name = ", ".join(dataset.name for dataset in datasets.values()) if self.images is None else ""
        name = name or str(root / str(self.images))
        stems, files, faults = self._images(root, datasets)
        used = set(files)
        structural = [
            problem
            for dataset in datasets.values()
            for problem in dataset.structural
            if not (problem.unlabelled and (self.partial or (self.image_list and problem.file not in used)))
        ]
        places, problems = self._pair(root, datasets, stems)
        problems += faults
        labelled = np.any([place >= 0 for place in places.values()], axis=0)
        bare = [files[i] or str(stems[i]) for i in np.flatnonzero(~labelled)]
        if bare and self.partial:
            reason = f"{len(bare)} of {len(files)} images have no label of any task and are not used (first: {bare[0]})"
            problems.append(Problem(name, reason, "warning"))
        kept = np.flatnonzero(labelled)
        return PairedDataset(
            name,
            [files[i] for i in kept],
            datasets,
            {task: place[kept] for task, place in places.items()},
            [*structural, *problems],
        )

    def _images(self, root: Path, datasets: Mapping[str, SampleDataset]) -> tuple[list[Any], list[str], list[Problem]]:
        """Return by what each image is paired, its file ("": that of the first source that has it), and faults."""
        if self.images is None:
            pairs = ((task, dataset) for task, dataset in datasets.items())
            stems = dict.fromkeys(stem for task, dataset in pairs for stem in self._stems(root, task, dataset))
            return list(stems), [""] * len(stems), []
        folder = root / self.images
        require_folder(folder, "images")
        files = [str(folder / file) for file in walk_images_or_arrays(folder)]
        found = {stem_of(file, str(folder)): file for file in files}
        if self.image_list is None:
            return [stem_of(file, str(folder)) for file in files], files, []
        lines = [line.strip() for line in read_text(root / self.image_list, file_names=True).splitlines()]
        listed = dict.fromkeys(_listed(line, found) for line in lines if line)
        if not listed:
            fault = Problem(str(root / self.image_list), "lists no image; write the name of one per line")
            return [], [], [fault]
        faults = [
            Problem(str(folder / name), f"is listed in {root / self.image_list}, but missing; add the image")
            for name in listed
            if name not in found
        ]
        kept = [name for name in listed if name in found]
        return list(kept), [found[name] for name in kept], faults

    def _stems(self, root: Path, task: str, dataset: SampleDataset) -> list[Any]:
        own = getattr(self.labels[task], "images", None)
        paths = [dataset.path(index) for index in range(len(dataset))]
        if paths and ".tar#" in paths[0]:  # the names of two samples may be equal in different tar files
            return paths
        if paths and re.search(r"#\d+$", paths[0]) and not Path(paths[0]).is_file():  # rows of a table
            return list(range(len(paths)))
        return [stem_of(path, None if own is None else str(root / own)) for path in paths]

    def _pair(
        self, root: Path, datasets: Mapping[str, SampleDataset], stems: Sequence[Any]
    ) -> tuple[dict[str, np.ndarray], list[Problem]]:
        """Return for each task the index of each image in its dataset, -1 for none, and what does not fit."""
        index_of = {stem: index for index, stem in enumerate(stems)}
        problems = [
            Problem(str(stem), "names two images of the joint group, which differ only in their suffix; keep one")
            for stem, count in Counter(stems).items()
            if count > 1
        ]
        places = {}
        for task, dataset in datasets.items():
            place = np.full(len(stems), -1, dtype=np.int64)
            strange, twice = [], []
            for own, stem in enumerate(self._stems(root, task, dataset)):
                at = index_of.get(stem)
                if at is None:
                    strange.append(dataset.path(own))
                elif place[at] >= 0:
                    twice.append(dataset.path(own))
                else:
                    place[at] = own
            missing = [str(stems[i]) for i in np.flatnonzero(place < 0).tolist()]
            for found, what in (
                (
                    [] if self.image_list else strange,
                    f"of its {len(dataset)} images are not among the {len(stems)} of the joint group",
                ),
                (twice, "of its images have more than one label"),
                ([] if self.partial else missing, f"of the {len(stems)} images of the joint group have no label of it"),
            ):
                if found:
                    hint = "; set 'partial: true' if that is meant" if found is missing else "; make them one image set"
                    reason = f"task '{task}': {len(found)} {what} (first: {found[0]}){hint}"
                    problems.append(Problem(dataset.name, reason))
            places[task] = place
            labelled = int((place >= 0).sum())
            if self.partial and labelled:
                reason = f"task '{task}': {labelled} of {len(stems)} images have a label of it"
                problems.append(Problem(dataset.name, reason, "warning"))
            elif self.partial and stems:
                reason = f"task '{task}': none of the {len(stems)} images has a label of it; there is nothing to learn"
                hint = f" (its source has {dataset.path(0)} first)" if len(dataset) else ""
                problems.append(Problem(dataset.name, reason + hint))
        return places, problems


JOINT_SOURCES: tuple[type[SourceConfig], ...] = (PairedSource, OwnSource, ScriptSource)
"""The source classes of joint groups."""


def _one_or_several(value: Any, handler: Any) -> Any:
    expected: Any = Annotated[list[JointSource], Field(min_length=1)] if isinstance(value, list) else JointSource
    return TypeAdapter(expected).validate_python(value)


if TYPE_CHECKING:
    JointSource = SourceConfig
    JointSources = SourceConfig | list[SourceConfig]
else:
    JointSource = source_type(JOINT_SOURCES)
    """Where the samples of a joint group come from: one of the source classes, selected by `format`."""
    JointSources = Annotated[JointSource | list[JointSource], WrapValidator(_one_or_several)]
    """One source, or a list of sources whose samples are concatenated."""


class GroupSource(SourceConfig):
    """All sources of one joint group: concatenated, and reduced to one part if there is a split.

    `JointConfig` constructs it; it is no format of the YAML file.
    """

    format: str = "group"
    group: str
    """Name of the group."""
    tasks: list[str]
    """Its tasks."""
    sources: list[SourceConfig]
    """The sources, in their order."""
    classes: dict[str, ClassNames] = {}
    """Task -> class names, for tasks that give them."""
    split: Split | None = None
    """How the images are divided; None uses all of them."""
    part: Literal["train", "test"] = "train"
    """What the images are used for; with a split, the part of it that is opened."""

    def open(self, root: Path, classes: Names | None = None) -> JointDataset:  # type: ignore[override]
        given = {task: read_classes(names, root) for task, names in self.classes.items()}
        names: dict[str, Any] = {**given, **(classes or {})}
        datasets: list[JointDataset] = []
        for source in self.sources:
            dataset: Any = open_source(source, root, names or None, strict=False)  # type: ignore[arg-type]
            self._check(dataset)
            datasets.append(dataset)
            names = {**dataset.classes_of, **names}
        if len(datasets) == 1 and self.split is None:
            whole = datasets[0]
        else:
            structural = [problem for dataset in datasets for problem in dataset.structural]
            indices = None
            if self.split is not None:
                indices, warnings = part_of_split(datasets, root, self.split, self.part)
                structural += warnings
            whole = CombinedJointDataset(datasets, [source.weight for source in self.sources], indices, structural)
        if not any(problem.level == "error" for problem in whole.structural):
            whole.structural = [*whole.structural, *self._without_labels(whole)]
        return whole

    def _without_labels(self, dataset: JointDataset) -> list[Problem]:
        """Return an error for each task of which no image has a label, in test data a warning."""
        train = self.part == "train"
        reason = f"none of the {len(dataset)} images has a label of it"
        reason += ", so it has nothing to learn from" if train else ", so its metrics say nothing"
        bare = [task for task in self.tasks if len(dataset) and not len(dataset.rows(task))]
        advice = f"add labels, or take the task out of joint.{self.group}"
        level: Literal["error", "warning"] = "error" if train else "warning"
        return [Problem(dataset.name, f"task '{task}': {reason}; {advice}", level) for task in bare]

    def _check(self, dataset: SampleDataset) -> None:
        if not isinstance(dataset, JointDataset):
            raise DataError(
                f"{dataset.name}: holds {dataset.kind} data, joint.{self.group} needs images with labels for several "
                "tasks; give a source of format joint, or a subclass of allinone_ds.data.JointDataset"
            )
        for what, found in (("kinds", dataset.kinds), ("classes_of", dataset.classes_of)):
            if not set(self.tasks) <= set(found):
                raise DataError(
                    f"{dataset.name}: {what} has {', '.join(sorted(found)) or 'nothing'}, the tasks of "
                    f"joint.{self.group} are {', '.join(self.tasks)}; give labels for all of these"
                )


class TaskOfGroup(SourceConfig):
    """What one task sees of a joint group. `TaskConfig` constructs it; it is no format of the YAML file."""

    format: str = "task_of_group"
    group: GroupSource
    task: str

    def open(self, root: Path, classes: Sequence[str] | None = None) -> TaskView:
        names = None if classes is None else {self.task: classes}
        dataset: Any = open_source(self.group, root, names, strict=False)  # type: ignore[arg-type]
        view = TaskView(dataset, self.task)
        view.structural = dataset.structural
        return view


def check_labels(group: str, tasks: Sequence[str], sources: Sequence[SourceConfig]) -> None:
    """Raise unless each source of a joint group names labels for exactly its tasks.

    Raises:
        ConfigError: names the task and what is allowed.
    """
    for source in sources:
        if isinstance(source, PairedSource):
            for task in source.labels:
                if task not in tasks:
                    raise ConfigError(f"joint.{group}: labels of '{task}', which is no task of the group; "
                                      f"{did_you_mean(task, tasks)}")  # fmt: skip
            missing = [task for task in tasks if task not in source.labels]
            if missing:
                raise ConfigError(
                    f"joint.{group}: a source has no labels of '{missing[0]}'; add labels.{missing[0]} to it, or take "
                    "the task out of the group"
                )


def _listed(line: str, known: Container[str]) -> str:
    """Return the image that a line of a list names: without its suffix, and without the -1, 0 or 1 of VOC's lists."""
    names = line, os.path.splitext(line)[0], re.sub(r"\s+-?[01]$", "", line)
    return next((name for name in names if name in known), names[1])


def _list(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)
