"""The interface of every dataset: samples, class names, and the problems found in its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch.utils.data import Dataset

from allinone_ds.errors import BrokenSample, DataError, printable
from allinone_ds.strict import Strict

Sample = dict[str, Any]
"""One sample of any task.

Always: `image`, a tv_tensors.Image uint8 (3, H, W), upright; `path`, a str; `index`, its position in the dataset.
Detection: `boxes`, tv_tensors.BoundingBoxes XYXY float32 (n, 4) in pixels; `labels`, long (n,) in 0..K-1; `iscrowd`,
bool (n,). Segmentation: `mask`, a tv_tensors.Mask uint8 (H, W) of classes 0..K-1 and 255 (ignore).
Classification: `label`, an int in 0..K-1. Retrieval: `label`, an int that stands for an identity.
Attributes: `attributes`, float32 (A,) of 1 (present), 0 (absent) and NaN (no label). Regression: `value`, float64 (C,),
NaN where there is no value. Instances: the keys of detection, and `masks`, a tv_tensors.Mask uint8 (n, H, W) of 0, 1.
Keypoints: the keys of detection; `keypoints`, `augmentation.objects.Points` (n, P, 2) of x, y in pixels; `visible`,
uint8 (n, P) of 0 (no label), 1 (hidden) and 2; `area` of the objects, float32 (n,) in squared pixels of the original
image; `mirrored`, long (n, P), the order of the points in a mirrored image; `corner`, see
`augmentation.objects.corner`. Depth: `depth`, a DenseMap float32 (H, W) above 0. Normals: `normals`, a NormalMap
float32 (3, H, W) of length 1: x right, y down, z towards the viewer. Both are NaN in pixels without a value. Edges and
saliency: `edges`, an EdgeMap, and `saliency`, a tv_tensors.Mask, uint8 (H, W): 0, 1 and 255 (ignore).
Of a joint group: `targets`, {task: the keys above of its kind} for the tasks that have a label of the image.
"""

IGNORE = 255
"""Value of the pixels without a class in the mask of every sample."""

_SHOWN = 10  # problems that an error message lists before it only counts the rest


class Problem(NamedTuple):
    """One fault of the data.

    Example:
        >>> print(Problem("cars/7.jpg", "file is missing"))
        cars/7.jpg: file is missing
    """

    file: str
    """The file or folder."""
    reason: str
    """What is wrong with it and what to do."""
    level: Literal["error", "warning"] = "error"
    """An error stops a run; a warning is only reported."""
    unlabelled: bool = False
    """Whether an image has no label, which a joint group with `partial` allows."""
    unused: frozenset[str] = frozenset()
    """Images below the folder `file` that are not used, of the warning that says so."""

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.reason}")


class Part(NamedTuple):
    """A range of consecutive samples of a dataset, and how many of them are drawn per epoch.

    Example:
        >>> Part(samples=100, per_epoch=200).selection
        0
    """

    samples: int
    """Number of samples."""
    per_epoch: int
    """Number of draws per epoch; without weights the number of samples."""
    selection: int = 0
    """A number that differs if different samples were chosen, 0 if all are used."""


class Expect(Strict):
    """The size of a complete dataset, so that a run does not train on an incomplete copy."""

    samples: PositiveInt | None = None
    """Number of samples."""
    classes: PositiveInt | None = None
    """Number of classes."""


class SourceConfig(Strict):
    """Base of the source classes, one per data format. A subclass sets `format: Literal["its name"]`."""

    format: str
    """Name of the data format."""
    expect: Expect | None = None
    """Number of samples and classes of the complete dataset; any other number is an error."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """In a list of sources: how many times per epoch each sample of this one is drawn."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        """Return the dataset, with the faults that show without decoding an image in its `structural`.

        `open_source` calls this method, checks the dataset's size and raises the faults.

        Args:
            root: folder that relative paths start at.
            classes: class names of the train set, whose order the labels follow; None for the dataset's own order.

        Raises:
            DataError: the dataset cannot be opened at all.
        """
        raise NotImplementedError


class SampleDataset(Dataset[Sample]):
    """A dataset of `Sample`s.

    A subclass needs `kind`, `classes`, `__len__` and `__getitem__`, which raises `BrokenSample` for a sample that
    cannot be read.

    Example:
        >>> import torch
        >>> from torchvision import tv_tensors
        >>> class Shades(SampleDataset):
        ...     kind, classes, name = "classification", ["dark", "bright"], "shades"
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         image = tv_tensors.Image(torch.full((3, 4, 4), 200 * index, dtype=torch.uint8))
        ...         return {"image": image, "label": index, "path": self.path(index), "index": index}
        >>> dataset = Shades()
        >>> dataset[1]["path"], list(dataset.problems())
        ('shades#1', [None, None])
    """

    kind: str
    """What the samples carry: a key of `allinone_ds.tasks.TASKS`, or the kind of a custom task."""
    classes: list[str]
    """Class names; a label is an index into this list. Empty for kinds without classes."""
    name: str = "dataset"
    """The file or folder that error messages name."""
    in_memory: bool = False
    """Whether `annotation` reads no file, so that all annotations of a large dataset are counted."""
    structural: Sequence[Problem] = ()
    """Faults found without decoding an image. `open_source` raises the errors among them."""
    labels: Sequence[int] | None = None
    """Classification: the label of each sample, if known without reading it; a split then holds per class."""
    opened_from: tuple[SourceConfig, Path] | None = None
    """The source and the root folder that `open_source` opened the dataset from; None: it was made otherwise."""

    @property
    def draw_parts(self) -> tuple[Part, ...]:
        """The samples that are drawn with different weights, in their order; together they are all samples."""
        return (Part(len(self), len(self)),)

    def random_index(self) -> int:
        """Draw a sample with torch's generator, according to the weights of the parts."""
        return int(torch.randint(len(self), ()))

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Return the file of a sample without reading it."""
        return f"{self.name}#{index}"

    def encoded(self, index: int) -> bytes | None:
        """Return the content of a sample's image file, or None if there is no such file."""
        try:
            return Path(self.path(index)).read_bytes()
        except (OSError, ValueError):
            return None

    def annotation(self, index: int) -> Sample:
        """Return what is learned from a sample, to be counted: `label`; `mask`; or `boxes`, `labels` and `size`.

        `boxes` (n, 4) are XYXY in pixels of the image, whose `size` is (H, W) or None; `iscrowd` is optional. The
        default reads the sample. A subclass that can need not decode the image, and returns all boxes as stored.

        Raises:
            BrokenSample: the sample cannot be read.
        """
        sample = self[index]
        return {**sample, "size": tuple(sample["image"].shape[-2:])}

    def check(self, index: int) -> list[Problem]:
        """Read one sample completely and return what is wrong with it."""
        try:
            self[index]
        except BrokenSample as error:
            return [Problem(error.path, error.reason)]
        return []

    def problems(self) -> Iterator[Problem | None]:
        """Yield the structural faults, then, for every sample, its faults, or None if it has none."""
        yield from self.structural
        for index in range(len(self)):
            yield from self.check(index) or (None,)


def size_problems(dataset: SampleDataset, expect: Expect | None = None) -> list[Problem]:
    """Return the faults in a dataset's number of samples and classes.

    Args:
        dataset: an opened dataset.
        expect: its complete size; None only refuses an empty dataset.
    """
    expect = expect or Expect()
    problems = []
    if len(dataset) == 0 and not any(p.level == "error" for p in dataset.structural):
        problems.append(Problem(dataset.name, "contains no sample; provide at least one"))
    for what, expected, found in (
        ("samples", expect.samples, len(dataset)),
        ("classes", expect.classes, len(dataset.classes)),
    ):
        if expected is not None and found != expected:
            gap = f"{expected - found} missing" if found < expected else f"{found - expected} too many"
            reason = f"holds {found} {what}, expect.{what} is {expected}: {gap}; complete the set or correct 'expect'"
            problems.append(Problem(dataset.name, reason))
    return problems


def raise_problems(name: str, problems: Iterable[Problem]) -> None:
    """Raise a `DataError` that lists the first errors among `problems`; do nothing if there are only warnings."""
    errors = [p for p in problems if p.level == "error"]
    if not errors:
        return
    lines = [f"  {problem}" for problem in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        lines.append(f"  ... and {len(errors) - _SHOWN} more; `allinone-ds check CONFIG` lists all")
    count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    raise DataError("\n".join([f"{name}: {count} in the data", *lines]), errors)
