"""What the kinds with one vector per image share: pooling of the feature maps, and targets with unknown entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from allinone_ds.data.base import Sample
from allinone_ds.strict import Strict
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.test_time import TestTime, View, refuse_windows

_NAMED = 8
"""Entries that a drawing names."""


class PooledOptions(Strict):
    """Options of a head on pooled features.

    Example:
        >>> PooledOptions(dropout=0.1).dropout
        0.1
    """

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a pooled feature in training."""


class Pooling(nn.Module):
    """Mean over the cells of all feature maps, LayerNorm and dropout.

    Args:
        channels: channels C of each map.
        num_levels: number of maps.
        dropout: probability of dropping a feature in training.

    Attributes:
        width: channels of the result.
    """

    def __init__(self, channels: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.width = channels * num_levels
        self.norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.dropout(self.norm(torch.cat([level.mean(dim=(-2, -1)) for level in features], dim=1)))


class EntriesTask(Task):
    """Base class of the kinds that predict one number for each of `classes`, of which some may be unknown in the truth.

    Labels: (B, C) float64, NaN where there is no value. A subclass implements `values` and `prediction`.

    Attributes:
        pooling: returns the pooled features (B, channels).
        output: linear layer, one row per class; it starts with small weights and a bias of 0.
    """

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(name, classes, *args, **kwargs)
        self.pooling = Pooling(self.channels, self.num_levels, self.options.dropout)
        self.output = nn.Linear(self.pooling.width, len(self.classes))
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    @abstractmethod
    def values(self, outputs: Any) -> Tensor:
        """Return numbers (B, C) that may be averaged over views, from what `forward` returned."""

    @abstractmethod
    def prediction(self, values: Tensor) -> Prediction:
        """Return the prediction of one image from its `values` (C,)."""

    def count_labels(self, labels: Any) -> int:
        """Return the number of known entries."""
        return int((~labels.isnan()).sum())

    @torch.no_grad()
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        return [self.prediction(values) for values in self.values(outputs)]

    def check_test_time(self, options: TestTime) -> None:
        refuse_windows(self.name, self.kind, options)

    @torch.no_grad()
    def predict_views(self, views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return predictions from the means over the views."""
        means = torch.stack([self.values(view.outputs[0]) for view in views]).mean(0)
        return [self.prediction(values) for values in means[: len(sizes)]]

    def example_labels(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, len(self.classes))


def some_of(lines: Sequence[str]) -> list[str]:
    """Return the first lines of a caption, and how many more there are."""
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return [*lines[:_NAMED], *more]


def stack_entries(samples: Sequence[Sample], key: str) -> Tensor:
    """Return the samples' entries, float64 (B, C) so that large numbers keep their digits.

    A sample without any entry gets NaN in all columns.

    Args:
        samples: samples with (C,) numbers under `key`; those without any label have (0,).
        key: "attributes" or "value".
    """
    rows = [torch.as_tensor(sample[key], dtype=torch.float64).reshape(-1) for sample in samples]
    width = max((len(row) for row in rows), default=0)
    missing = torch.full((width,), float("nan"), dtype=torch.float64)
    return torch.stack([row if len(row) == width else missing for row in rows])


def known_entries(labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (B, C) with 0 in place of NaN, and which entries are known, bool (B, C).

    Args:
        labels: float64 (B, C), or (B, 0) if no image has a label.
        predicted: (B, C).
    """
    if labels.shape[1] == 0:
        labels = torch.full_like(predicted, float("nan"))
    if labels.shape != predicted.shape:
        raise ValueError(
            f"labels of {labels.shape[1]} columns, the task has {predicted.shape[1]}: {tuple(labels.shape)}; give one "
            "number per class, NaN where it is not known"
        )
    known = ~labels.isnan()
    return torch.where(known, labels, 0.0), known
