"""What a weighting is: a function from a small record of the step to one factor per task.

T tasks. A weighting never sees a gradient, only inner products of gradients, so it costs nothing and gives the same
result on every rank. A weighting that streams (`Weighting.streams`) is applied as soon as a task is done, and one extra
gradient shard is enough for any T. The others need the T shards kept until the last task is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EPS = 1e-6
"""Added to a norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does. A norm below it counts as zero."""


@dataclass(frozen=True)
class StepRecord:
    """What a weighting may look at.

    Args:
        tasks: names of the T tasks, in the order in which they were declared.
        gram: inner products of the tasks' gradients restricted to the shared backbone, (T, T); for a weighting that
            streams T is 1, unless it is `batched`.
        whole_norms: norms of the tasks' whole gradients, heads included, (T,).
        losses: the tasks' losses, mean over micro-steps and ranks, (T,).

    Example:
        >>> import torch
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 9.0]])
        >>> record = StepRecord(("det", "seg"), gram, whole_norms=torch.tensor([5.0, 6.0]), losses=torch.ones(2))
        >>> record.norms
        tensor([2., 3.])
    """

    tasks: tuple[str, ...]
    gram: Tensor
    whole_norms: Tensor
    losses: Tensor

    @property
    def norms(self) -> Tensor:
        """Norms of the tasks' backbone gradients, (T,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()


class Weighting(ABC):
    """Base of the weightings: turns a `StepRecord` of T tasks into T factors for the tasks' gradients.

    Attributes:
        streams: True when the factor of a task depends on that task alone.
        batched: True when a weighting that streams computes the factors of several tasks in one call as well.
        on_cpu: True when a weighting that does not stream gets its record on the CPU, where solvers run.
        heads: "same": the gradient of a head gets the factor of its task. "none": heads keep their raw gradient.

    Example:
        >>> import torch
        >>> class Inverse(Weighting):
        ...     '''Scale every gradient to norm 1.'''
        ...
        ...     def factors(self, record):
        ...         return 1 / (record.norms + EPS)
        >>> gram, ones = torch.tensor([[4.0]]), torch.ones(1)
        >>> Inverse().factors(StepRecord(("det",), gram, ones, ones))
        tensor([0.5000])
    """

    streams: bool = True
    batched: bool = False
    on_cpu: bool = False
    heads: str = "same"

    @abstractmethod
    def factors(self, record: StepRecord) -> Tensor:
        """Return the factors of the tasks' gradients, (T,)."""

    def check_tasks(self, tasks: tuple[str, ...]) -> None:  # noqa: B027 - most weightings accept any tasks
        """Raise a ValueError unless the weighting can serve these tasks."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `factors` carries from one step to the next, as tensors and plain values; empty for most.

        A step that is given up, or goes on without a task that is not finite, restores it, so `factors` must not change
        these values in place.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most weightings have no state
        """Restore what `state_dict` returned."""

    def sum_factor(self, whole_norm: Tensor) -> Tensor | None:
        """Return a last factor for the sum of all tasks' gradients; None leaves the sum as it is.

        Args:
            whole_norm: norm of the sum, heads included, 0-dim.
        """
        return None
