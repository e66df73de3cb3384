"""What the kinds with one vector per image share: pooling of the feature maps, and tables of unknown entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from allinone_ds.data.base import Sample
from allinone_ds.errors import ConfigError
from allinone_ds.strict import Strict
from allinone_ds.tasks.base import Task
from allinone_ds.tasks.test_time import TestTime


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


def refuse_windows(task: Task, options: TestTime) -> None:
    """Refuse windows, which show only a part of an image.

    Raises:
        ConfigError: `windows` is set.
    """
    if options.windows:
        raise ConfigError(
            f"tasks.{task.name}.test_time.windows: a window shows only a part of the image, but {task.kind} is about "
            "the whole; remove it"
        )
