"""What every dataset gives and how its faults are named: `SampleDataset`, `Problem`, `DataError`,
`BrokenSample`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import PositiveInt
from torch.utils.data import Dataset

from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import Strict, did_you_mean

Sample = dict[str, Any]
"""One sample, whatever the task.

Always: `image` tv_tensors.Image uint8 (3, H, W), upright; `path` str; `index` int, its place in the dataset.
Detection: `boxes` tv_tensors.BoundingBoxes XYXY float32 (n, 4) in pixels, `labels` long (n,) in 0..K-1,
`iscrowd` bool (n,). Segmentation: `mask` tv_tensors.Mask uint8 (H, W), 255 = ignore.
Classification: `label` int in 0..K-1.
"""

ClassNames = list[str] | str
"""Class names as a config gives them: a list by id, or a text file with one name a line."""

BOX_TOLERANCE = 1.0
"""Pixels by which a box may stick out of its image: less is rounding and is cut off, more is an error."""

_SHOWN = 10  # problems that an error message lists before it says how many more there are


class Problem(NamedTuple):
    """One fault of the data: `file`, `reason`, and `level` ("error" stops a run, "warning" is only told)."""

    file: str
    reason: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Expect(Strict):
    """What a complete set holds, so that a set with files missing is not trained on by mistake."""

    samples: PositiveInt | None = None
    """Number of samples."""
    classes: PositiveInt | None = None
    """Number of classes."""


class SourceConfig(Strict):
    """Base of the sources: what any of them may say."""

    expect: Expect | None = None
    """What the set must hold; opening it, and a check, say what is missing."""


class SampleDataset(Dataset[Sample]):
    """A dataset of `Sample`s. A dataset of your own needs `kind`, `classes`, `__len__` and `__getitem__`.

    `__getitem__` raises `BrokenSample` for a sample that cannot be read.
    """

    kind: str
    """What the samples carry: "detection", "segmentation", "classification", or a kind of your own."""
    classes: list[str]
    """Class names; a label is a place in this list."""
    name: str = "dataset"
    """The file or folder that error messages name."""
    structural: list[Problem]
    """Faults found without opening an image. Errors among them are raised when the dataset is opened
    strictly."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """The file of a sample, without reading it."""
        return f"{self.name}#{index}"

    def check(self, index: int) -> list[Problem]:
        """Reads one sample in full and tells what is wrong with it (an empty list when nothing is)."""
        try:
            self[index]
        except BrokenSample as error:
            return [Problem(error.path, error.reason)]
        return []

    def problems(self) -> Iterator[Problem | None]:
        """Scans everything: the structural faults, then of each sample its faults, or None when it is fine."""
        yield from getattr(self, "structural", [])
        for index in range(len(self)):
            found = self.check(index)
            yield from found if found else (None,)

    def settle(self, strict: bool) -> None:
        """Ends a constructor: an empty set is a fault; in strict mode structural errors are raised.

        Raises:
            DataError: lists the first faults and says how many more there are.
        """
        if len(self) == 0 and not any(p.level == "error" for p in self.structural):
            self.structural.append(Problem(self.name, "there is no sample in it; give a set with at least one"))
        if strict:
            raise_problems(self.name, self.structural)


def unmet(expect: Expect, dataset: SampleDataset) -> list[Problem]:
    """What a set holds too little or too much of."""
    found = []
    for what, wanted, has in (
        ("samples", expect.samples, len(dataset)),
        ("classes", expect.classes, len(dataset.classes)),
    ):
        if wanted is not None and has != wanted:
            gap = f"{wanted - has} missing" if has < wanted else f"{has - wanted} too many"
            reason = f"holds {has} {what}, expect.{what} is {wanted}: {gap}; complete the set or correct 'expect'"
            found.append(Problem(dataset.name, reason))
    return found


def raise_problems(name: str, problems: Iterable[Problem]) -> None:
    """Raises a `DataError` that lists the errors among `problems`; does nothing when there are none."""
    errors = [p for p in problems if p.level == "error"]
    if not errors:
        return
    lines = [f"  {problem}" for problem in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        lines.append(f"  ... and {len(errors) - _SHOWN} more; `allinone-ds check CONFIG` lists all")
    count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    raise DataError("\n".join([f"{name}: {count} in the data", *lines]), errors)


def match_classes(name: str, found: list[str], wanted: list[str] | None) -> dict[int, int]:
    """Maps this set's class ids to those of another set (its train set) by name.

    Args:
        name: the file that error messages name.
        found: class names of this set, by id.
        wanted: class names of the train set, by id; None keeps the set's own.

    Returns:
        {id in this set: id in the train set}

    Raises:
        DataError: a name is used twice, or the train set lacks it.
    """
    twice = sorted({n for n in found if found.count(n) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise DataError(f"{name}: class names stand there twice: {', '.join(twice)}; give every class its own name")
    if wanted is None:
        return {i: i for i in range(len(found))}
    place = {n: i for i, n in enumerate(wanted)}
    missing = [n for n in found if n not in place]
    if missing:
        raise DataError(f"{name}: class '{missing[0]}' is not in the train set; {did_you_mean(missing[0], wanted)}")
    return {i: place[n] for i, n in enumerate(found)}


def read_classes(classes: ClassNames | None, root: Path) -> list[str] | None:
    """Class names as the config gives them: a list, a text file with one name a line, or nothing.

    Raises:
        DataError: the file is missing or holds no name.
    """
    if not isinstance(classes, str):
        return classes
    file = root / classes
    lines = [line.strip() for line in read_text(file).splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise DataError(f"{file}: there is no class name in it; write one name a line")
    return names


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        DataError: the file is missing, not readable or not text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: file is missing; correct the path (relative paths start at data_root)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from None


def need_folder(folder: Path, field: str) -> None:
    """Raises a `DataError` that names the config's `field` when `folder` is not a folder."""
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is none"
        raise DataError(f"{folder}: '{field}' must be a folder, {what}; correct '{field}' or data_root")


def boxes_outside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which boxes stick out of their image by more than `BOX_TOLERANCE` pixels.

    Args:
        boxes: (n, 4) XYXY in pixels.
        size: (H, W) of the image.

    Returns:
        bool (n,)
    """
    height, width = size
    low = (boxes[:, :2] < -BOX_TOLERANCE).any(axis=1)
    return low | (boxes[:, 2] > width + BOX_TOLERANCE) | (boxes[:, 3] > height + BOX_TOLERANCE)


def are_fractions(boxes: np.ndarray) -> bool:
    """Whether boxes (n, 4) XYXY are parts of the picture and not pixels: some have area, no corner lies beyond 1."""
    return bool((boxes[:, 2:] > boxes[:, :2]).all(axis=1).any() and boxes.max() <= 1)


FRACTIONS = "the boxes lie within 0..1, as parts of the picture; multiply them by its width and height in pixels"


def outside_reason(box: np.ndarray, size: tuple[int, int]) -> str:
    """The reason text for one box (4,) XYXY outside an image of `size` (H, W)."""
    corners = ", ".join(f"{v:g}" for v in box)
    return (
        f"box (x1 y1 x2 y2 = {corners}) lies outside its image of {size[1]} x {size[0]} (width x height); "
        "correct or remove the annotation"
    )


IGNORE = 255
"""Value of pixels without a class in every sample's mask."""
