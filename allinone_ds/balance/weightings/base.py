"""What a weighting is: from a small record of the step to one factor per task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EPS = 1e-6
"""Added to a norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does."""


@dataclass(frozen=True)
class StepRecord:
    """What a weighting may look at.

    Args:
        tasks: names of the T tasks, in the order they ran.
        gram: inner products of the tasks' gradients restricted to the shared backbone, (T, T); for a weighting that
            streams T is 1.
        whole_norms: norms of the tasks' whole gradients, heads included, (T,).
        losses: the tasks' losses, mean over micro-steps and ranks, (T,).
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
    """Turns a `StepRecord` of T tasks into T factors for the tasks' gradients."""

    streams: bool = True
    """True when a task's factor depends on that task alone."""

    heads: str = "same"
    """"same": a head's gradient gets its task's factor. "none": heads keep their raw gradient."""

    @abstractmethod
    def factors(self, record: StepRecord) -> Tensor:
        """Factors of the tasks' gradients, (T,)."""

    def state_dict(self) -> dict[str, Any]:
        """What `factors` carries from one step to the next, as tensors and plain values; empty for most."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Take over what `state_dict` gave."""

    def sum_factor(self, whole_norm: Tensor) -> Tensor | None:
        """A last factor for the sum of all tasks' gradients, from its norm (heads included); None: leave the sum."""
        return None
