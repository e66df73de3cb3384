"""The task that runs now: its micro-steps counted, its losses checked and averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allinone_ds.errors import BalancerError


class RunningTask:
    """One task of a step, from the beginning of its block to the end.

    Args:
        name: of the task.
        micro_steps: number of micro-batches that its gradient is the mean of.
        device: of the losses.

    Attributes:
        loss: mean of the losses so far over all micro-steps, 0-dim.

    Raises:
        BalancerError: `micro_steps` is not an integer of 1 or more.
    """

    def __init__(self, name: str, micro_steps: int, device: torch.device):
        if not isinstance(micro_steps, int) or micro_steps < 1:
            raise BalancerError(f"micro_steps = {micro_steps!r} for task '{name}'; allowed: an integer of 1 or more")
        self.name = name
        self.micro_steps = micro_steps
        self.loss = torch.zeros((), device=device)
        self._done = 0

    @property
    def next_is_last(self) -> bool:
        """Whether the next micro-step is the last."""
        return self._done == self.micro_steps - 1

    def scaled(self, loss: Any) -> Tensor:
        """Return the loss of the next micro-step, divided by the number of micro-steps, after checking it.

        Raises:
            BalancerError: one micro-step too many, or a loss that is not a scalar with a graph.
        """
        if self._done == self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' got more than its {self.micro_steps} micro-steps; pass micro_steps=K to "
                "balancer.task() for K backward calls"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            kind = type(loss).__name__
            if isinstance(loss, Tensor):
                kind = f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
            raise BalancerError(f"the loss of task '{self.name}' is {kind}; pass a scalar tensor with requires_grad")
        loss = loss.reshape(())
        self.loss += loss.detach().float() / self.micro_steps
        return loss / self.micro_steps

    def count(self) -> None:
        """Count one micro-step whose backward is done."""
        self._done += 1

    def check_complete(self) -> None:
        """Raise unless all micro-steps are done.

        Raises:
            BalancerError: some are missing.
        """
        if self._done != self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' ended after {self._done} of {self.micro_steps} micro-steps; call "
                "balancer.backward(loss) exactly micro_steps times inside the block"
            )
