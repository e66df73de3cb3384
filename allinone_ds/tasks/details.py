"""What an evaluation says about every class, as plain numbers and lists for metrics.json and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Details = dict[str, Any]
"""Details of one task's evaluation; all keys are optional.

classes: K class names. per_class: column -> K values, None where a class has none; the first column is the one that is
logged. metrics: name -> value, further metrics of the whole task. confusion: counts, rows are the truth, named by
confusion_names; only up to `MAX_MATRIX` classes. confused: the most frequent [true class, predicted class, count] of
two different classes. notes: warnings for the user. worst: the images with the lowest scores, lowest first, each
{"index", "path", "score"}.
"""

MAX_MATRIX = 50
"""Classes up to which details hold the whole confusion matrix."""
MAX_COUNTED = 2000
"""Classes up to which confusions are counted, in a matrix of K x K on every rank."""
_CONFUSED = 20  # pairs of classes that are listed


def class_details(
    classes: Sequence[str],
    columns: Mapping[str, Tensor | Sequence[float | None]],
    confusion: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Details:
    """Return details in plain numbers.

    Args:
        classes: K class names.
        columns: name -> K values; NaN stands for no value.
        confusion: counts (L, L), rows are the truth.
        names: L names of the rows of `confusion`; None: `classes`.

    Example:
        >>> counts = torch.tensor([[2, 2], [0, 0]])
        >>> found = class_details(["cat", "dog"], {"accuracy": torch.tensor([0.5, float("nan")])}, counts)
        >>> found["per_class"], found["confused"]
        ({'accuracy': [0.5, None]}, [['cat', 'dog', 2]])
    """
    details: Details = {
        "classes": list(classes),
        "per_class": {name: [_plain(value) for value in values] for name, values in columns.items()},
    }
    if confusion is not None:
        names = list(classes if names is None else names)
        wrong = confusion.clone().fill_diagonal_(0)
        counts, places = wrong.flatten().topk(min(_CONFUSED, wrong.numel()))
        details["confused"] = [
            [names[place // len(names)], names[place % len(names)], count]
            for count, place in zip(counts.tolist(), places.tolist(), strict=True)
            if count
        ]
        if len(names) <= MAX_MATRIX + 1:
            details["confusion"] = confusion.tolist()
            details["confusion_names"] = names
    return details


def _plain(value: Any) -> float | int | None:
    number = value.item() if isinstance(value, Tensor) else value
    return None if number is None or math.isnan(number) else number


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole in float64, NaN where the whole is 0."""
    return torch.where(whole > 0, part.double() / whole.double(), float("nan"))
