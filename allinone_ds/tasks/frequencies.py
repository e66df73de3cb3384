"""Class frequencies of training data, which priors and balanced class weights are computed from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from allinone_ds.data.base import SampleDataset
from allinone_ds.errors import BrokenSample
from allinone_ds.tasks.base import Task

_NAMED = 4  # classes that a message lists


def use_frequencies(
    tasks: Mapping[str, Task], data: Mapping[str, SampleDataset], stored: dict[str, list[float]] | None = None
) -> list[str]:
    """Count the classes of the training data for the tasks that need them, and hand the frequencies over.

    Every rank reads the same samples, evenly spread over the data, and gets the same result.

    Args:
        tasks: tasks by name.
        data: task -> training data.
        stored: task -> frequencies from the start of a run, which are not counted again; those that are counted are
            added.

    Returns:
        One text per task whose classes were counted.
    """
    notes = []
    stored = {} if stored is None else stored
    for name, task in tasks.items():
        if name in stored:
            task.use_frequencies(stored[name])
            continue
        most = task.samples_to_count()
        counts = _count(task, data[name], most) if most else None
        if counts is not None:
            frequencies, images = counts
            stored[name] = frequencies
            text = task.use_frequencies(frequencies)
            if text is not None:
                notes.append(f"{name}: in {images} training images, {text}")
                continue
            order = sorted(range(len(frequencies)), key=lambda k: -frequencies[k])
            named = ", ".join(f"{task.classes[k]} {frequencies[k]:.2%}" for k in order[:_NAMED])
            absent = sum(frequency == 0 for frequency in frequencies)
            notes.append(
                f"{name}: class frequencies of {images} training images: {named}"
                + (", ..." if len(order) > _NAMED else "")
                + (f"; {absent} of {len(order)} classes in none of them" if absent else "")
            )
    return notes


def _count(task: Task, dataset: SampleDataset, most: int) -> tuple[list[float], int] | None:
    """Return the mean of the samples' class shares and the number of samples; None if no sample has a target."""
    count = min(most, len(dataset))
    total, images = torch.zeros((), dtype=torch.float64), 0
    for place in range(count):
        try:
            shares = task.class_shares(dataset[place * len(dataset) // count])
        except BrokenSample:  # counted when training reads it
            continue
        if shares is not None:
            total, images = total + shares.double(), images + 1
    return ((total / images).tolist(), images) if images else None
