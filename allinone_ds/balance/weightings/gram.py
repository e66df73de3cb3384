"""Weightings computed from the Gram matrix of the tasks' gradients by any callable, such as a torchjd Weighting."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from allinone_ds.balance.weightings.base import StepRecord, Weighting


class GramWeighting(Weighting):
    """Any function from the Gram matrix of the tasks' backbone gradients to weights, such as a `torchjd` Weighting.

    Heads keep their raw gradient, since such methods are defined on the shared parameters.

    Args:
        function: from a (T, T) positive semi-definite matrix to (T,) weights.

    Example:
        >>> import torch
        >>> from allinone_ds import GramWeighting, StepRecord
        >>> inverse_norms = GramWeighting(lambda gram: gram.diagonal().rsqrt())
        >>> gram, ones = torch.tensor([[4.0, 0.0], [0.0, 16.0]]), torch.ones(2)
        >>> inverse_norms.factors(StepRecord(("det", "seg"), gram, ones, ones))
        tensor([0.5000, 0.2500])
    """

    streams = False
    heads = "none"

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def factors(self, record: StepRecord) -> Tensor:
        weights = self.function(record.gram)
        if not isinstance(weights, Tensor) or weights.shape != record.losses.shape:
            returned = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"{self!r} returned {returned} for a {tuple(record.gram.shape)} Gram matrix; "
                f"a weighting returns a tensor of shape ({len(record.tasks)},)"
            )
        return weights.detach().to(record.gram)

    def __repr__(self) -> str:
        return f"GramWeighting({self.function!r})"


def as_weighting(weighting: Any) -> Weighting:
    """Return `weighting` itself, or a callable on a Gram matrix as a `GramWeighting`.

    Raises:
        TypeError: `weighting` is neither.
    """
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type) and issubclass(weighting, Weighting):
        raise TypeError(f"weighting is the class {weighting.__name__}; pass an instance: {weighting.__name__}()")
    if _is_aggregator(weighting):
        raise TypeError(
            f"weighting is torchjd's aggregator {type(weighting).__name__}, a function of Jacobians; pass its "
            f"weighting of Gram matrices: torchjd.aggregation.{type(weighting).__name__}Weighting()"
        )
    if callable(weighting) and not isinstance(weighting, type):
        return GramWeighting(weighting)
    raise TypeError(
        f"weighting is {type(weighting).__name__}; allowed: TBGC, TaskClip, GlobalClip, Sum or another Weighting, "
        "or a callable from a (T, T) Gram matrix to (T,) weights, such as a torchjd Weighting"
    )


def _is_aggregator(weighting: Any) -> bool:
    """Return whether `weighting` is an aggregator of torchjd, which is not imported for it."""
    torchjd = sys.modules.get("torchjd.aggregation")
    return torchjd is not None and isinstance(weighting, torchjd.Aggregator)
