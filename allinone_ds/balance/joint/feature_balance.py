"""FeatureBalance: balancing at the features without DeepSpeed, in any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from allinone_ds.balance.assignment import task_names
from allinone_ds.balance.joint.block import FeatureBlock, feature_weighting
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.balance.weightings.gram import as_weighting
from allinone_ds.errors import BalancerError


class FeatureBalance:
    """Balances tasks at the features in any training loop: one process, DDP, FSDP2; DeepSpeed is not needed.

    The gradient of a task at the features that its head reads is measured over all ranks, and what the backbone gets is
    the sum of the tasks' gradients times their factors, in one backward. Heads keep their raw gradient. With K
    micro-steps each one is scaled by the factors of its own norms.

    Args:
        tasks: names of the T tasks.
        weighting: as for `TaskBalancer`; `GlobalClip` and `TaskClip` need norms that are not known at the features.
        group: process group of the R ranks that average their gradients; None is the default group, if there is one.

    Raises:
        ConfigError: a weighting that cannot be computed at the features.

    Example:
        >>> import torch
        >>> from allinone_ds import TBGC, FeatureBalance, task_features
        >>> backbone, heads = torch.nn.Linear(4, 3), torch.nn.ModuleDict({t: torch.nn.Linear(3, 1) for t in ("a", "b")})
        >>> balance = FeatureBalance(("a", "b"), TBGC(max_norm=0.1))
        >>> with balance.joint():
        ...     features = backbone(torch.ones(2, 4))
        ...     balance.backward({t: head(task_features(features, t)).square().mean() for t, head in heads.items()})
        >>> sorted(balance.report().norms)
        ['a', 'b']
    """

    def __init__(self, tasks: Iterable[str], weighting: Weighting | Any, *, group: Any = None):
        self.tasks = task_names(tasks)
        self.weighting = feature_weighting(as_weighting(weighting))
        self.weighting.check_tasks(self.tasks)
        self._group, self._checked = group, set[str]()
        self._block: FeatureBlock | None = None

    @contextlib.contextmanager
    def joint(self, micro_steps: int = 1) -> Iterator[None]:
        """Run a step's micro-steps: exactly `micro_steps` forwards, each with one call of `backward`.

        Raises:
            BalancerError: blocks inside each other, or another number of micro-steps.
        """
        self._block = FeatureBlock(self.tasks, self.weighting, micro_steps, self._group, self._checked)
        with self._block.active():
            yield
        self._block.check_complete()

    def backward(self, losses: Mapping[str, Tensor | None], count: Mapping[str, Tensor | float] | None = None) -> None:
        """Run the one backward of a micro-step. Collective.

        Args:
            losses: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            count: task -> number of labels (images, valid pixels, objects) that the loss is the mean of; the gradient
                of a task is then the mean over the labels of all ranks. None: every loss counts the same.

        Raises:
            BalancerError: outside a block, one micro-step too many, or losses that do not fit the tasks.
        """
        if self._block is None:
            raise BalancerError("backward() outside its block; use it inside `with balance.joint():`")
        with self._block.micro_step(losses, count) as total:
            total.backward()

    def report(self) -> StepReport:
        """Return what the last block did to each task; `skipped` names tasks that were not finite.

        Do not step the optimizer when `skipped` is not empty: the gradients of the heads are not finite then.

        Raises:
            BalancerError: no block has ended.
        """
        if self._block is None:
            raise BalancerError("report() before a block has ended; run `with balance.joint():` first")
        return self._block.report()

    def state_dict(self) -> dict[str, Any]:
        """Return what the weighting carries from one step to the next."""
        return dict(self.weighting.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.weighting.load_state_dict(state)
