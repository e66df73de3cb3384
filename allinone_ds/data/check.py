"""The check of all data of a run: every fault of every file, with a progress bar."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from allinone_ds.data.base import Problem, SampleDataset, size_problems
from allinone_ds.data.formats.common.listing import unused_by_both
from allinone_ds.data.images import is_turned, stored_bits
from allinone_ds.data.inspection.files import depth_problems, overlap_problems, turned_problems
from allinone_ds.data.inspection.samples import fault_of
from allinone_ds.data.inspection.targets import READ_IN_CHECK, target_problems
from allinone_ds.data.joint.dataset import JointDataset, TaskView
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import BrokenSample, DataError

_LARGE = (10**9, 10**9)
_CHUNK = 256  # samples submitted to the threads at a time: bounds memory and keeps all threads busy


def check_sources(
    sources: Mapping[str, SampleDataset | Source],
    root: Path | str = ".",
    progress: bool = True,
    classes_of: Mapping[str, str] | None = None,
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> list[Problem]:
    """Read every sample of every source and return all faults.

    Warnings report files of equal content within one source, files that are listed twice, images that no annotation
    lists, boxes that are not used, classes that do not occur, files that are not read, and test images that are also
    training images. If all of them are, or if nothing can be learned from a train set, it is an error.

    Args:
        sources: {label: dataset, or source of a config}; the label is shown beside the progress bar.
        root: folder that relative paths of sources start at (`data_root`).
        progress: draw a progress bar on stderr.
        classes_of: {label of a test set: label of its train set, which precedes it in `sources`}; a class that the
            train set does not have is then an error.
        image_sizes: {label: (H, W) in pixels that the images are resized to}, to count the boxes that vanish; without
            it, they are compared in the size of their images.

    Returns:
        The faults in the order of sources and samples, without repetition; `level` is "error" or "warning".

    Example:
        >>> from allinone_ds.data import ImageListSource
        >>> source = ImageListSource(format="image_list", images=".", list="no_such_list.txt")
        >>> [problem] = check_sources({"cls train": source}, root="/", progress=False)
        >>> print(problem)
        cls train: /no_such_list.txt: file is missing; correct the path (relative paths start at data_root)
    """
    found: dict[Problem, None] = {}  # a set that keeps the order
    classes_by_label: dict[str, Any] = {}
    problems_of: dict[str, list[Problem]] = {}
    paths_by_label: dict[str, dict[bytes, str]] = {}  # path of the first sample by digest of its file
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for label, source in sources.items():
            if isinstance(source, SampleDataset):
                dataset = source
                found.update(dict.fromkeys(size_problems(dataset)))
            else:
                try:
                    classes = classes_by_label.get((classes_of or {}).get(label, ""))
                    dataset = open_source(source, root, classes, strict=False)
                except DataError as error:
                    found[Problem(label, str(error))] = None
                    continue
            classes_by_label[label] = dataset.classes_of if isinstance(dataset, JointDataset) else dataset.classes
            train_label = (classes_of or {}).get(label)
            structural = problems_of[label] = list(dataset.structural)
            if train_label in problems_of:
                before = problems_of[train_label]
                after, structural = unused_by_both(before, structural)
                for problem in before:
                    if problem.unused and problem not in after:
                        found.pop(problem, None)
                found.update(dict.fromkeys(after))
            found.update(dict.fromkeys(structural))
            size = (image_sizes or {}).get(label, _LARGE)
            found.update(dict.fromkeys(_targets(dataset, size, train_label is None)))
            of_train = paths_by_label.get(train_label or "", {})
            first_of = paths_by_label[label] = {}
            bits_found = Counter[int]()
            turned: list[str] = []
            common: dict[int, str] = {}  # path in the train set by index
            row = bar.add_task(label, total=len(dataset))
            indices = iter(range(len(dataset)))
            # Threads suffice: decoding and hashing release the interpreter's lock. Processes would pickle the dataset.
            while chunk := list(islice(indices, _CHUNK)):
                scanned = pool.map(lambda i, dataset=dataset: _scan(dataset, i), chunk)
                for index, scan in zip(chunk, scanned, strict=True):
                    path = dataset.path(index)
                    found.update(dict.fromkeys(scan.problems))
                    if scan.turned:
                        turned.append(path)
                    if scan.bits is not None:
                        bits_found[scan.bits] += 1
                    if scan.digest is not None and first_of.setdefault(scan.digest, path) != path:
                        reason = f"has the same content as {first_of[scan.digest]}"
                        found[Problem(path, reason, "warning")] = None
                    if scan.digest is not None and scan.digest in of_train:
                        common[index] = of_train[scan.digest]
                    bar.advance(row)
            found.update(dict.fromkeys(depth_problems(dataset.name, bits_found)))
            found.update(dict.fromkeys([*turned_problems(dataset, turned), *overlap_problems(dataset, common)]))
    return list(found)


def _targets(dataset: SampleDataset, image_size: tuple[int, int], train: bool) -> list[Problem]:
    seen = [TaskView(dataset, task) for task in dataset.kinds] if isinstance(dataset, JointDataset) else [dataset]
    try:
        return [problem for view in seen for problem in target_problems(view, image_size, train, READ_IN_CHECK)]
    except Exception:  # a custom dataset may raise anything; the scan of its samples reports it
        return []


class _Scan(NamedTuple):
    problems: list[Problem]
    digest: bytes | None = None
    """Digest of the image file; None without one."""
    bits: int | None = None
    """Bits of a 16-bit image."""
    turned: bool = False
    """Whether the image is turned without a change of its size."""


def _scan(dataset: SampleDataset, index: int) -> _Scan:
    """Return the faults of one sample, and what is compared with other samples."""
    try:
        if type(dataset).check is SampleDataset.check:  # nothing else has checked what a class of one's own returns
            fault = fault_of(dataset, dataset[index])
            problems = [] if fault is None else [Problem(dataset.path(index), fault)]
        else:
            problems = list(dataset.check(index))
    except BrokenSample as error:
        problems = [Problem(error.path, error.reason)]
    except Exception as error:  # a custom dataset may raise anything; the check continues with the next sample
        problems = [Problem(dataset.path(index), f"raised {type(error).__name__}: {error}")]
    data = dataset.encoded(index)
    if data is None:
        return _Scan(problems)
    return _Scan(problems, hashlib.blake2b(data).digest(), stored_bits(data), is_turned(data))
