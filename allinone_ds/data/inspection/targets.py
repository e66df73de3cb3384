"""Count what can be learned from a dataset: usable boxes, label maps with classes, images per class, maps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from allinone_ds.data.base import IGNORE, Problem, Sample, SampleDataset
from allinone_ds.data.inspection import maps
from allinone_ds.errors import BrokenSample

READ_AT_START = 64
"""Samples that are read at the start of a run where annotations are not in memory, evenly spaced."""
READ_IN_CHECK = 1000
"""Samples that `check` reads, and that the start of a run reads before it says that there is nothing to learn."""

_JOINED = 10_000  # samples whose boxes become one array


def _similar(classes: Sequence[str]) -> list[str]:
    """Return a warning if names of classes differ only in case, spaces, "-" or "_", or nothing."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        number = name.lstrip("-").isdecimal()
        groups[name if number else re.sub(r"[\s_-]", "", name.casefold())].append(name)
    alike = [" = ".join(map(repr, names)) for names in groups.values() if len(names) > 1]
    if not alike:
        return []
    shown = ", ".join(alike[:5]) + (", ..." if len(alike) > 5 else "")
    return [f"{len(alike)} classes are written in several ways, which count as different classes: {shown}; write one"]


class _Found(NamedTuple):
    read: int
    """Samples that were read."""
    usable: int
    """Targets that training can use."""
    none: str
    """What is wrong if none is usable."""
    warnings: list[str]
    used: set[int]
    """Labels that occur."""
    unused: str
    """Text of the warning that some do not: `no box has category`."""
    constant: dict[int, str] | None = None
    """Labels whose target is the same in all samples, each with a text that says so."""


def target_problems(
    dataset: SampleDataset, image_size: tuple[int, int], train: bool = True, most: int = READ_AT_START
) -> list[Problem]:
    """Return what cannot be learned from a dataset, with numbers.

    Nothing usable is an error in training data and a warning in test data. A part that is lost, a single class, and
    classes that do not occur are warnings. Annotations in memory are all counted. Of others, `most` samples are read,
    and up to 1000 if nothing is usable in these. A dataset of a custom kind is not counted.

    Args:
        dataset: an opened dataset.
        image_size: (H, W) in pixels that its images are resized to.
        train: whether it is training data.
        most: number of samples to read.
    """
    count = _COUNTS.get(dataset.kind)
    if count is None or len(dataset) == 0:
        return []
    complete = dataset.in_memory or len(dataset) <= most
    found = count(_read(dataset, range(len(dataset)) if complete else spread(len(dataset), most)), image_size)
    if found is not None and not found.usable and not complete:
        complete = len(dataset) <= READ_IN_CHECK
        found = count(_read(dataset, spread(len(dataset), READ_IN_CHECK)), image_size)
    if found is None or not found.read:  # targets of another form, or no sample can be read, which others report
        return []
    seen = "" if complete else f" (in {found.read} of {len(dataset)} samples, evenly spaced)"
    if not found.usable:
        reason = f"nothing can be learned: {found.none}{seen}; correct the annotations"
        return [Problem(dataset.name, reason, "error" if train else "warning")]
    warnings = [*found.warnings, *(_similar(dataset.classes) if train else ())]
    if train and complete:
        unused = [name for label, name in enumerate(dataset.classes) if label not in found.used]
        if unused:
            shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            warnings.append(f"{found.unused} {shown} ({len(unused)} of {len(dataset.classes)}); add some or remove it")
    if train and found.constant:
        named = [f"{dataset.classes[label]} ({text})" for label, text in found.constant.items()]
        shown = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        warnings.append(
            f"{len(named)} of {len(dataset.classes)} columns have nothing to tell apart{seen}: {shown}; remove them, "
            "or add images of other values"
        )
    if train and dataset.kind in ("segmentation", "classification") and len(found.used) == 1:
        name = dataset.classes[min(found.used)]
        warnings.append(f"only class '{name}' occurs{seen}, so there is nothing to tell apart; add other classes")
    return [Problem(dataset.name, reason.replace("{seen}", seen), "warning") for reason in warnings]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0..count-1, evenly spaced, with the first and the last one."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def _read(dataset: SampleDataset, indices: Iterable[int]) -> Iterator[Sample]:
    for index in indices:
        try:
            yield dataset.annotation(index)
        except BrokenSample:  # training replaces and counts it
            continue


def _boxes(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found:
    read = 0
    joined: list[tuple[np.ndarray, ...]] = [(np.empty((0, 4)), np.empty(0, int), np.empty(0, bool), np.empty((0, 2)))]
    remaining = iter(samples)
    while some := list(islice(remaining, _JOINED)):  # arrays of single samples take more memory than what they hold
        read += len(some)
        joined.append(_joined(some))
    boxes, labels, crowd, sizes = (np.concatenate(arrays) for arrays in zip(*joined, strict=True))
    with np.errstate(invalid="ignore"):
        inside = np.stack([boxes[:, :2].clip(0), np.minimum(boxes[:, 2:], sizes)])
        sides = inside[1] - inside[0]
        small = (sides * (np.array(image_size[::-1]) / sizes) < 1).any(axis=1) & np.isfinite(sizes).all(axis=1)
    lost = {
        "have no area or a negative size": (sides <= 0).any(axis=1),
        "are crowds": crowd,
        f"are smaller than 1 pixel at the image_size {image_size[0]} x {image_size[1]} (height x width)": small,
    }
    free = np.ones(len(boxes), dtype=bool)
    parts, wrong = [], 0
    for what, mask in lost.items():
        number = int((mask & free).sum())
        free &= ~mask
        wrong += 0 if what == "are crowds" else number
        parts += [f"{number} {what}"] if number else []
    usable = int(free.sum())
    text = f"{len(boxes) - usable} of {len(boxes)} boxes are not used in training{{seen}}: {', '.join(parts)}"
    return _Found(
        read,
        usable,
        f"of {len(boxes)} boxes, {', '.join(parts)}" if len(boxes) else "there is no box",
        [text] if wrong or len(boxes) - usable > usable else [],  # a few crowds are usual
        set(labels[free].tolist()),
        "no box has category",
    )


def _joined(samples: Sequence[Sample]) -> tuple[np.ndarray, ...]:
    """Return all boxes (n, 4) of some samples, their labels (n,), crowd flags (n,) and sizes of image (n, 2): W, H."""
    boxes = [np.asarray(sample["boxes"]).reshape(-1, 4) for sample in samples]
    counts = [len(of_one) for of_one in boxes]
    labels = [np.asarray(sample["labels"]) for sample in samples]
    crowd = [np.asarray(s.get("iscrowd", [0] * n)) for s, n in zip(samples, counts, strict=True)]
    sizes = np.array([sample["size"] or (np.inf, np.inf) for sample in samples], dtype=np.float64)[:, ::-1]
    types = ((boxes, np.float64), (labels, np.int64), (crowd, np.bool_))
    return *(np.concatenate(arrays).astype(dtype) for arrays, dtype in types), np.repeat(sizes, counts, axis=0)


def _points(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found:
    """Count the visible points of the objects that are no crowds."""
    objects = count = without = 0

    def counted() -> Iterator[Sample]:
        nonlocal objects, count, without
        for sample in samples:
            visible = np.asarray(sample["visible"]) > 0
            objects += len(visible)
            count += int(visible.sum())
            without += int((~visible.any(axis=1)).sum()) if visible.ndim == 2 and visible.shape[1] else 0
            yield sample

    found = _boxes(counted(), image_size)
    if found.usable and not count:
        return found._replace(usable=0, none=f"none of {objects} objects has a visible point")
    text = f"{without} of {objects} objects have no visible point, of which only the boxes are learned{{seen}}"
    return found._replace(warnings=[*found.warnings, *([text] if 2 * without > objects else [])])


def _masks(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found:
    used: set[int] = set()
    empty = read = 0
    for sample in samples:
        counts = np.bincount(np.asarray(sample["mask"]).ravel(), minlength=IGNORE + 1)
        found = set(np.flatnonzero(counts[:IGNORE]).tolist())
        used |= found
        empty += not found
        read += 1
    text = f"{empty} of {read} label maps that were read have no pixel of a class, all are ignored"
    return _Found(
        read,
        read - empty,
        f"none of {read} label maps has a pixel of a class, all pixels are ignored",
        [text] if empty else [],
        used,
        "no label map has a pixel of class",
    )


def _labels(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found | None:
    labels = [sample["label"] for sample in samples]
    if not all(isinstance(label, int) for label in labels):
        return None
    return _Found(len(labels), len(labels), "", [], set(labels), "no image has class")


def _maps(inspect: Callable[[Iterable[Sample]], maps.Inspected | None]) -> Callable[..., _Found | None]:
    """Return the count of a kind with a number per pixel and no classes."""

    def count(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found | None:
        found = inspect(samples)
        return None if found is None else _Found(*found, set(), "")

    return count


def _columns(samples: Iterable[Sample], key: str, what: str) -> _Found | None:
    """Count the known entries of tables with one number per class, NaN for an unknown one."""
    rows = [np.asarray(sample[key], dtype=np.float64).reshape(-1) for sample in samples]
    if len({len(row) for row in rows}) != 1:
        return None
    values = np.stack(rows)  # (n, C)
    known = ~np.isnan(values)
    constant = {}
    for label in range(values.shape[1]):
        column = values[known[:, label], label]
        if len(column) == 0:
            constant[label] = f"no {what} in {len(rows)} images"
        elif (column == column[0]).all():
            constant[label] = f"{column[0]:g} in all {len(column)} images with a {what}"
    usable = int(known[:, [label for label in range(values.shape[1]) if label not in constant]].sum())
    empty = int((~known.any(axis=1)).sum())
    return _Found(
        len(rows),
        usable,
        f"no column has two different values, in {len(rows)} images with {int(known.sum())} {what}s",
        [f"{empty} of {len(rows)} images have no {what} at all and are not used in training{{seen}}"] if empty else [],
        set(range(values.shape[1])),
        "",
        constant,
    )


def _identities(samples: Iterable[Sample], image_size: tuple[int, int]) -> _Found | None:
    labels = [sample["label"] for sample in samples]
    if not labels or not all(isinstance(label, int) for label in labels):
        return None
    counts = Counter(labels)
    single = sum(count == 1 for count in counts.values())
    text = f"{single} of {len(counts)} identities have one image only{{seen}}, which no search can find"
    if single == len(counts):
        text = f"no two of {len(labels)} images show one identity{{seen}}: a loss on pairs is always 0, and a search "
        text += "finds nothing"
    return _Found(
        len(labels),
        len(labels) if len(counts) > 1 else 0,
        f"all {len(labels)} images show one identity",
        [text] if single else [],
        set(counts),
        "no image shows",
    )


_COUNTS: dict[str, Callable[[Iterable[Sample], tuple[int, int]], _Found | None]] = {
    "detection": _boxes,
    "segmentation": _masks,
    "classification": _labels,
    "depth": _maps(maps.depth),
    "normals": _maps(maps.normals),
    "edges": _maps(maps.edges),
    "saliency": _maps(maps.saliency),
    "instances": _boxes,
    "keypoints": _points,
    "retrieval": _identities,
    "attributes": lambda samples, size: _columns(samples, "attributes", "label"),
    "regression": lambda samples, size: _columns(samples, "value", "value"),
}
