"""A full scan of a run's data: every fault of every file, with a progress bar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from allinone_ds.data.base import Problem, SampleDataset
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import DataError

_AHEAD = 256  # samples handed to the threads at a time: bounds memory, keeps all threads busy


def check_sources(
    sources: Mapping[str, SampleDataset | Source],
    root: Path | str = ".",
    progress: bool = True,
    classes_of: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Reads every sample of every source and tells all that is wrong; never stops at the first fault.

    Also told, as warnings: files of the same content within one source, files listed twice, pictures that no
    annotation names, boxes without area.

    Args:
        sources: {label: dataset, or the config's source}; the label names the progress bar.
        root: folder that relative paths of sources start at (`data_root`).
        progress: draw a progress bar (on stderr).
        classes_of: {label of a test set: label of its train set, which stands before it in `sources`}; a class that the
            train set lacks is then told too.

    Returns:
        Faults in the order of sources and samples, each once. `level` tells errors from warnings.
    """
    found: dict[Problem, None] = {}
    known: dict[str, list[str]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for label, source in sources.items():
            if isinstance(source, SampleDataset):
                dataset = source
            else:
                try:
                    classes = known.get((classes_of or {}).get(label, ""))
                    dataset = open_source(source, root, classes, strict=False)
                except DataError as error:
                    found[Problem(label, str(error))] = None
                    continue
            known[label] = dataset.classes
            for problem in getattr(dataset, "structural", []):
                found[problem] = None
            first_of: dict[bytes, str] = {}
            row = bar.add_task(label, total=len(dataset))
            indices = iter(range(len(dataset)))
            # Threads, not processes: decoding and hashing release the interpreter's lock, and nothing is
            # pickled.
            while chunk := list(islice(indices, _AHEAD)):
                scanned = pool.map(lambda i, dataset=dataset: _scan(dataset, i), chunk)
                for index, (problems, digest) in zip(chunk, scanned, strict=True):
                    path = dataset.path(index)
                    if digest is not None and first_of.setdefault(digest, path) != path:
                        problems.append(Problem(path, f"has the same content as {first_of[digest]}", "warning"))
                    found.update(dict.fromkeys(problems))
                    bar.advance(row)
    return list(found)


def _scan(dataset: SampleDataset, index: int) -> tuple[list[Problem], bytes | None]:
    """Faults of one sample, and a digest of its file (None when it has no file of its own)."""
    try:
        with open(dataset.path(index), "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        digest = None
    try:
        return list(dataset.check(index)), digest
    except Exception as error:  # a dataset of the user's own may raise anything: tell it, go on
        return [Problem(dataset.path(index), f"raised {type(error).__name__}: {error}")], digest
