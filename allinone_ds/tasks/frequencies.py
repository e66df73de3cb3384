"""Class frequencies of training data, which priors and balanced class weights are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.errors import BrokenSample

_NAMED = 4  # classes that a message lists


class Counting(Protocol):
    """What counting uses of a `Task`."""

    classes: list[str]
    frequencies: list[float] | None

    def samples_to_count(self) -> int: ...
    def use_samples(self, samples: Iterable[Sample]) -> str | None: ...
    def class_shares(self, sample: Sample) -> Tensor | None: ...
    def use_frequencies(self, frequencies: Sequence[float]) -> str | None: ...


def use_frequencies(
    tasks: Mapping[str, Any], data: Mapping[str, SampleDataset], stored: dict[str, list[float]] | None = None
) -> list[str]:
    """Hand samples of the training data to the tasks that need them, to count classes or to measure targets.

    Every rank reads the same samples, evenly spread over the data, and gets the same result.

    Args:
        tasks: tasks by name.
        data: task -> training data.
        stored: task -> frequencies from the start of a run, which are not counted again; those that are counted are
            added.

    Returns:
        One text per task that found something.
    """
    notes = []
    stored = {} if stored is None else stored
    for name, task in tasks.items():
        if name in stored:
            if stored[name]:
                task.use_frequencies(stored[name])
            continue
        most = task.samples_to_count()
        note = task.use_samples(_spread(data[name], most)) if most else None
        if note is not None:
            stored[name] = list(task.frequencies or ())
            notes.append(f"{name}: {note}")
    return notes


def _spread(dataset: SampleDataset, most: int) -> Iterator[Sample]:
    count = min(most, len(dataset))
    for place in range(count):
        try:
            index = place * len(dataset) // count
            in_memory = getattr(dataset, "in_memory", False)  # data of the user's may be a list
            yield dataset.annotation(index) if in_memory else dataset[index]
        except BrokenSample:  # counted when training reads it
            continue


def count_classes(task: Counting, samples: Iterable[Sample]) -> str | None:
    """Hand the mean of the samples' class shares to `use_frequencies`, and return a text; None if none has a target.

    Args:
        task: the task, which returns the shares of a sample.
        samples: samples of the training data.
    """
    total, known, images = torch.zeros((), dtype=torch.float64), torch.zeros(()), 0
    for sample in samples:
        shares = task.class_shares(sample)
        if shares is not None:
            total, known = total + shares.double().nan_to_num(0.0), known + ~shares.isnan()
            images += 1
    if not images:
        return None
    frequencies = task.frequencies = (total / known.clamp(min=1)).tolist()
    text = task.use_frequencies(frequencies)
    if text is not None:
        return f"in {images} training images, {text}"
    order = sorted(range(len(frequencies)), key=lambda k: -frequencies[k])
    named = ", ".join(f"{task.classes[k]} {frequencies[k]:.2%}" for k in order[:_NAMED])
    absent = sum(frequency == 0 for frequency in frequencies)
    return (
        f"class frequencies of {images} training images: {named}"
        + (", ..." if len(order) > _NAMED else "")
        + (f"; {absent} of {len(order)} classes in none of them" if absent else "")
    )
