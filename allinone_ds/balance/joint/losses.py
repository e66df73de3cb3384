"""What the losses of a joint block must be: one per task, each a scalar, all from one forward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from allinone_ds.balance.joint.gate import apart_from_others
from allinone_ds.balance.running_task import check_loss
from allinone_ds.errors import BalancerError
from allinone_ds.strict import did_you_mean


def check_losses(tasks: Sequence[str], losses: Any) -> None:
    """Raise unless there is a loss, or None, for each task of a joint block.

    Raises:
        BalancerError: no mapping, unknown or missing tasks, or a loss that is not a scalar with a graph.
    """
    if not isinstance(losses, Mapping):
        raise BalancerError(
            f"balancer.backward() inside a joint block got {type(losses).__name__}; pass a dict: task -> loss, or None"
        )
    for task in losses:
        if task not in tasks:
            raise BalancerError(
                f"a loss of '{task}', which the joint block does not run; {did_you_mean(str(task), tasks)}"
            )
    for task in tasks:
        if task not in losses:
            raise BalancerError(
                f"no loss of task '{task}' in the joint block; pass None if this rank has no label of it"
            )
        if losses[task] is not None:
            check_loss(task, losses[task])


def check_one_forward(losses: Mapping[str, Tensor]) -> None:
    """Raise unless losses come from one forward; warn if the backward of one runs the heads of others too.

    Args:
        losses: task -> loss, of the tasks that have one.

    Raises:
        BalancerError: the graph of one has nothing in common with those of the others.
    """
    apart = apart_from_others(losses)
    if apart is not None:
        raise BalancerError(
            f"the graph of the loss of task '{apart}' does not meet those of the other tasks; the losses of a joint "
            "block come from the features of one forward, without detach(): give other tasks blocks of their own"
        )
    operations: dict[Any, str] = {}
    for task, loss in losses.items():
        first = operations.setdefault(loss.grad_fn, task)
        if first != task:
            warnings.warn(
                f"the losses of tasks '{first}' and '{task}' are outputs of one operation, as of a compiled model: the "
                "backward of one runs the heads of all, which takes longer, and a loss that is not finite spoils every "
                "task; compile the backbone and each head by itself, or balance at the features",
                stacklevel=2,
            )
            return
