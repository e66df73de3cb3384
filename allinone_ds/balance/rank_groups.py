"""What a balancer does with groups of ranks: the micro-batches of a rank, new groups, and the time of each task.

And the numbers of a caller that the messages between all ranks carry.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups, task_groups
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.task_parallel import GroupedCombiner
from allinone_ds.balance.running_task import opening_of_block
from allinone_ds.distributed import all_reduce, rank, world_size
from allinone_ds.errors import BalancerError
from allinone_ds.zero.guard import EngineGuard


def opening_of_step(tasks: Sequence[str], require_all: bool) -> str:
    """Return the point at which the ranks agree that the step of these tasks begins."""
    return f"balancer.step({'' if require_all else 'require_all=False'}) after {', '.join(tasks) or 'no task'}"


class RankGroups:
    """The part of `TaskBalancer` about ranks in different tasks and their messages; it has no state of its own.

    Example::

        balancer.regroup(plan_groups(balancer.measure(loss_of), micro_steps, world).groups)
    """

    groups: TaskGroups
    _agreement: Agreement | None
    _combiner: Combiner
    _guard: EngineGuard
    _running: Any

    def carry(self, numbers: Callable[[], Sequence[int]]) -> None:
        """Let the messages of `check_ranks` carry what `numbers` returns in each step, equally many on every rank."""
        if self._agreement:
            self._agreement.carry = numbers

    def plan_step(self, blocks: Sequence[tuple[Sequence[str], int]]) -> None:
        """Tell the balancer the blocks of the next step, where steps run different tasks: it then sends one message.

        Without it, ranks send a message at each point of a step that is not as the one before (`check_ranks`).

        Args:
            blocks: (tasks, micro-steps) of each block, in the order in which they will run, the same on every rank. The
                step ends with `step(require_all=False)`.

        Example:
            ::

                balancer.plan_step([(("det",), 2), (("seg", "depth"), 1)])
                with balancer.task("det", micro_steps=2):
                    ...
                with balancer.joint(("seg", "depth")):
                    ...
                balancer.step(require_all=False)
        """
        if self._agreement:
            named = {task for tasks, _ in blocks for task in tasks}
            ran = [task for task in self.groups.tasks if task in named]
            openings = [opening_of_block(" + ".join(tasks), micro_steps) for tasks, micro_steps in blocks]
            self._agreement.plan([*openings, opening_of_step(ran, require_all=False)])

    @property
    def carried(self) -> tuple[int, ...] | None:
        """The largest of each carried number over all ranks, in the last step; None where no message is sent."""
        return self._agreement.carried if self._agreement else None

    def share(self, task: str, micro_steps: int = 1) -> list[tuple[int, int]]:
        """Return (micro-step k, rank r) of each micro-batch of a task that this rank runs.

        Where every rank runs every task they are its own: (0, r), (1, r), ... Where tasks run on different ranks, the
        ranks of a task divide those that all R ranks would have run, so that the samples of a step are the same.

        Args:
            task: one of `tasks`.
            micro_steps: of one rank, if every rank ran every task.
        """
        return self.groups.share(task, micro_steps, rank())

    def regroup(self, groups: Mapping[str, int | Sequence[int]] | TaskGroups) -> None:
        """Change which ranks run which task, between steps. Collective.

        Args:
            groups: as in the constructor.

        Raises:
            ValueError, BalancerError: invalid groups; in the middle of a step, or parallel is not "tasks".
        """
        combiner = self._grouped_between_steps("regroup")
        new_groups = task_groups(groups, self.groups.tasks, self.groups.world)
        combiner.regroup(new_groups)
        self.groups = new_groups

    def measure(self, loss_of: Callable[[str], Tensor], repeats: int = 3) -> dict[str, float]:
        """Return the seconds of one micro-batch of every task, for `plan_groups`. Collective, between steps.

        No weight changes. Every rank runs every task, also those of other ranks, so give it data of all tasks.

        Args:
            loss_of: task -> loss of one micro-batch, from a forward of the engine.
            repeats: micro-batches per task after one to warm up.

        Returns:
            Task -> seconds of forward and backward: median of the repeats, mean over ranks; the same on all ranks.
        """
        self._grouped_between_steps("measure")
        return _measure_tasks(self.groups.tasks, self._combiner, self._guard, loss_of, repeats)

    def _grouped_between_steps(self, method: str) -> GroupedCombiner:
        if not isinstance(self._combiner, GroupedCombiner):
            raise BalancerError(f"{method}() is for parallel='tasks'; here every rank runs every task")
        if self._running is not None or self._combiner.tasks:
            raise BalancerError(f"{method}() in the middle of a step; call it after balancer.step()")
        if self._agreement:
            self._agreement.check(f"balancer.{method}()", within_step=False)
        return self._combiner


def _measure_tasks(
    tasks: Sequence[str], combiner: Combiner, guard: EngineGuard, loss_of: Callable[[str], Tensor], repeats: int
) -> dict[str, float]:
    """Return task -> seconds of forward and backward: median of the repeats, mean over ranks. Collective.

    Args:
        tasks: names of all tasks.
        combiner: between steps; every gradient is dropped.
        guard: of the engine.
        loss_of: task -> loss of one micro-batch, from a forward of the engine.
        repeats: micro-batches per task after one to warm up.
    """
    adapter = combiner.adapter

    def seconds(task: str) -> float:
        combiner.begin(task)
        adapter.set_reduces(False)
        adapter.synchronize()
        start = time.perf_counter()
        loss = loss_of(task)
        with guard.allowed():
            adapter.backward(loss)
        adapter.synchronize()
        taken = time.perf_counter() - start
        combiner.drop()
        return taken

    medians = [statistics.median([seconds(task) for _ in range(repeats + 1)][1:]) for task in tasks]
    combiner.close()
    mean = all_reduce(torch.tensor(medians, dtype=torch.float64, device=adapter.compute_device)) / world_size()
    return dict(zip(tasks, mean.tolist(), strict=True))
