"""Weightings computed from the Gram matrix of the tasks' gradients by any callable, such as a torchjd Weighting."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.balance.weightings.per_task import check_numbers, restore_state, state_of, weights_of


class GramWeighting(Weighting):
    """Any function from the Gram matrix of the tasks' backbone gradients to weights, such as a `torchjd` Weighting.

    The matrix is on the CPU, where such methods solve their problems, whatever the model computes on. Heads keep their
    raw gradient, since such methods are defined on the shared parameters. In a step without some of
    the tasks the function gets the matrix of the others; a torchjd Weighting then uses its numbers per task, such as a
    preference vector, for these tasks.

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
    on_cpu = True
    heads = "none"

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self._tasks: tuple[str, ...] = ()

    def check_tasks(self, tasks: tuple[str, ...]) -> None:
        check_numbers(self.function, tasks)
        self._tasks = tasks

    def factors(self, record: StepRecord) -> Tensor:
        tasks = self._tasks or record.tasks
        absent = [task for task in tasks if task not in record.tasks]
        rows = [tasks.index(task) for task in record.tasks]
        try:
            weights = weights_of(self.function, record.gram, rows, len(tasks))
        except Exception as error:
            if absent:
                error.add_note(
                    f"{self!r} got the {tuple(record.gram.shape)} Gram matrix of {', '.join(record.tasks)}, in a step "
                    f"without {', '.join(absent)} (absent, or not finite); it must serve any number of tasks"
                )
            raise
        if not isinstance(weights, Tensor) or weights.shape != record.losses.shape:
            returned = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"{self!r} returned {returned} for a {tuple(record.gram.shape)} Gram matrix; "
                f"a weighting returns a tensor of shape ({len(record.tasks)},)"
            )
        return weights.detach().to(record.gram)

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.function)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore_state(self.function, state)

    def __repr__(self) -> str:
        return f"GramWeighting({self.function!r})"


def kind_of(weighting: Any) -> str:
    """Return whose state a weighting has: its class, and that of its function."""
    names = [type(part).__name__ for part in (weighting, getattr(weighting, "function", None)) if part is not None]
    return " of ".join(names)


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
            f"weighting of Gram matrices: {_gram_method(type(weighting).__name__)}"
        )
    if _reads_jacobians(weighting):
        raise TypeError(
            f"weighting is torchjd's {type(weighting).__name__.lstrip('_')}, which reads a Jacobian; pass a weighting "
            "of Gram matrices, such as torchjd.aggregation.UPGradWeighting()"
        )
    if callable(weighting) and not isinstance(weighting, type):
        return GramWeighting(weighting)
    raise TypeError(
        f"weighting is {type(weighting).__name__}; allowed: TBGC, TaskClip, GlobalClip, Sum or another Weighting, "
        "or a callable from a (T, T) Gram matrix to (T,) weights, such as a torchjd Weighting"
    )


_OF_ROWS = ("ConstantWeighting", "MeanWeighting", "RandomWeighting", "SumWeighting")
"""Weightings of torchjd that look at the number of rows of a matrix only, so that they serve a Gram matrix too."""


def _is_aggregator(weighting: Any) -> bool:
    """Return whether `weighting` is an aggregator of torchjd, which is not imported for it."""
    torchjd = sys.modules.get("torchjd.aggregation")
    return torchjd is not None and isinstance(weighting, torchjd.Aggregator)


def _reads_jacobians(weighting: Any) -> bool:
    """Return whether `weighting` is a torchjd Weighting of Jacobians; torchjd names their argument `matrix`."""
    torchjd = sys.modules.get("torchjd.aggregation")
    if torchjd is None or not isinstance(weighting, torchjd.Weighting) or type(weighting).__name__ in _OF_ROWS:
        return False
    return "matrix" in inspect.signature(type(weighting).forward).parameters


def _gram_method(aggregator: str) -> str:
    """Return how to write the weighting of Gram matrices that belongs to an aggregator of torchjd."""
    if aggregator == "NashMTL":
        return "weighting_from_config({'name': 'nash_mtl', 'n_tasks': T})"
    if hasattr(sys.modules["torchjd.aggregation"], f"{aggregator}Weighting"):
        return f"torchjd.aggregation.{aggregator}Weighting()"
    return f"{aggregator} has none; choose a different method"
