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

    def samples_to_count(self) -> int: ...
    def use_samples(self, samples: Iterable[Sample]) -> str | None: ...
    def class_shares(self, sample: Sample) -> Tensor | None: ...
    def use_frequencies(self, frequencies: Sequence[float]) -> None: ...


def use_frequencies(tasks: Mapping[str, Any], data: Mapping[str, SampleDataset]) -> list[str]:
    """Hand samples of the training data to the tasks that need them, to count classes or to measure targets.

    Every rank reads the same samples, evenly spread over the data, and gets the same result.

    Args:
        tasks: tasks by name.
        data: task -> training data.

    Returns:
        One text per task that found something.
    """
    notes = []
    for name, task in tasks.items():
        most = task.samples_to_count()
        note = task.use_samples(_spread(data[name], most)) if most else None
        if note is not None:
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
    K = len(task.classes)
    total, known, images = torch.zeros(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), 0
    for sample in samples:
        shares = task.class_shares(sample)
        if shares is not None:
            total += shares.double().nan_to_num(0.0)
            known += ~shares.isnan()
            images += 1
    if not images:
        return None
    frequencies = (total / known.clamp(min=1)).tolist()
    task.use_frequencies(frequencies)
    order = sorted(range(K), key=lambda k: -frequencies[k])
    named = ", ".join(f"{task.classes[k]} {frequencies[k]:.2%}" for k in order[:_NAMED])
    absent = sum(frequency == 0 for frequency in frequencies)
    return (
        f"class frequencies of {images} training images: {named}"
        + (", ..." if K > _NAMED else "")
        + (f"; {absent} of {K} classes in none of them" if absent else "")
    )
