"""Joint blocks on an engine: one forward gives the losses of several tasks."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.exact import ExactCombiner, require_exact
from allinone_ds.balance.combiners.features import FeaturesCombiner
from allinone_ds.balance.heads import HeadUse
from allinone_ds.balance.joint.block import FeatureBlock, feature_weighting
from allinone_ds.balance.joint.counts import LabelCounts, check_counts
from allinone_ds.balance.joint.losses import check_losses, check_one_forward
from allinone_ds.balance.running_task import Backward, RunningTask, check_loss
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.distributed import gather_objects, rank, world_size
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.strict import did_you_mean
from allinone_ds.zero.local_gradients import LocalGradients
from allinone_ds.zero.params import whole_shape

PLACES = ("backbone", "features")
"""Where a joint block can balance."""


class JointTasks(RunningTask, ABC):
    """Base of joint blocks: several tasks of a step whose losses come from one forward.

    Args:
        tasks: names of the T tasks.
        micro_steps: number of forwards.
        combiner: takes the tasks' gradients.
        heads: records which head parameters each task uses.
        agreement: with the other ranks; None: they are not asked.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        micro_steps: int,
        combiner: Combiner,
        heads: HeadUse,
        agreement: Agreement | None = None,
    ):
        super().__init__(" + ".join(tasks), micro_steps, combiner, agreement)
        self.tasks = tuple(tasks)
        self._heads = heads
        self._counts = LabelCounts(len(tasks), micro_steps, agreement)
        self._counted = False
        self._every_head = combiner.adapter.stage == 3  # or other ranks wait for the weights of one that is not run

    def backward(self, loss: Any, count: Any, run: Backward) -> None:
        """Run the backwards of the next micro-step.

        Args:
            loss: task -> mean loss over this rank's labels, scalar; None: this rank has no label of the task.
            count: task -> number of labels; None: every loss counts the same.
            run: the engine's backward.

        Raises:
            BalancerError: as `RunningTask.backward`, and losses that do not fit the tasks.
        """
        self.check_next()
        check_losses(self.tasks, loss)
        check_counts(self.tasks, loss, count)
        if self._done and (count is None) == self._counted:
            raise BalancerError(f"task '{self.name}': give count in every micro-step of the block, or in none")
        self._counted = count is not None
        with self.micro_step(communicates=True):
            weights = self._weights(loss, count)
            self._run(loss, weights, run)

    @abstractmethod
    def _run(self, losses: Mapping[str, Any], weights: Mapping[str, float], run: Backward) -> None:
        """Run the backwards of a micro-step. Collective.

        Args:
            losses: task -> loss, or None.
            weights: task -> what its loss is multiplied by.
            run: the engine's backward.
        """

    def _weights(self, losses: Mapping[str, Tensor | None], count: Any) -> dict[str, float]:
        """Return what each loss is multiplied by, after the ranks have exchanged what they have. Collective."""
        numbers = [0 if losses[task] is None else 1 if count is None else count[task] for task in self.tasks]
        weights = self._counts.weights(numbers, self._flags(losses))
        self._alike = [len(set(of_ranks)) == 1 for of_ranks in zip(*self._counts.flags, strict=True)]
        if self._every_head:
            self._refuse_missing_losses(self._counts.flags)
        return dict(zip(self.tasks, weights, strict=True))

    def _flags(self, losses: Mapping[str, Tensor | None]) -> list[int]:
        """Return numbers that ranks exchange with their counts; where they differ, ranks reduce in an order of ours."""
        return [int(losses[task] is not None) for task in self.tasks]

    def _average(self, part: Tensor | None, alike: bool, run: Backward, retain: bool = False) -> None:
        """Run a backward on the ranks that have the loss and average its gradient over all ranks. Collective.

        Args:
            part: the loss of this rank; None where it has none.
            alike: whether all ranks use the same parameters.
            run: the engine's backward.
            retain: whether a further backward needs the graph.
        """
        adapter = self._combiner.adapter
        if alike:
            run(part, True, retain)
        elif not adapter.keeps_local_gradients:  # DeepSpeed reduces every parameter, zeros for those without a gradient
            run(_nothing(adapter.engine) if part is None else part, True, retain)
        else:  # it reduces in the order of the backward, so ranks must not use different parameters
            local = LocalGradients(adapter)
            local.begin()
            if part is not None:
                run(part, False, retain, True)
            has = [local.get(index) is not None for index in range(len(local.params))]
            for index, wanted in enumerate(self._union(has)):
                if wanted and not has[index]:
                    param = local.params[index]
                    local.set(index, torch.zeros(whole_shape(param), dtype=local.dtype, device=param.device))
            local.reduce()

    def _union(self, flags: list[bool]) -> list[bool]:
        """Return the element-wise `or` of every rank's flags. Collective."""
        if self._agreement:
            return self._agreement.union(flags)
        return [any(of_ranks) for of_ranks in zip(*gather_objects(flags), strict=True)]

    def _refuse_missing_losses(self, rows: Sequence[Sequence[Any]]) -> None:
        """Raise if only some ranks have a loss: the others would not gather the weights that its backward needs."""
        for index, task in enumerate(self.tasks):
            without = [rank for rank, row in enumerate(rows) if not row[index]]
            if without and len(without) < len(rows):
                raise BalancerError(
                    f"task '{task}' has no loss on rank(s) {', '.join(map(str, without))} and one on the others; under "
                    "ZeRO-3, and with norm='features', every rank must run every head: return a loss of the head's "
                    "output on each rank, and pass count=0 for it where there is no label"
                )


class JointAtBackbone(JointTasks):
    """Joint block that is balanced at the backbone: one backward per task.

    Args:
        tasks: names of the T tasks.
        micro_steps: number of forwards.
        combiner: takes the tasks' gradients.
        heads: records which head parameters each task uses.
        agreement: with the other ranks; None: they are not asked.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        micro_steps: int,
        combiner: ExactCombiner,
        heads: HeadUse,
        agreement: Agreement | None = None,
    ):
        super().__init__(tasks, micro_steps, combiner, heads, agreement)
        self._exact = combiner
        self._losses = {task: torch.zeros_like(self.loss) for task in tasks}

    def hand_over(self) -> None:
        if self.micro_steps > 1:
            for task, unit in zip(self.tasks, self._counts.units(), strict=True):
                if unit:
                    self._exact.add(task, self._losses[task], unit)

    def _labelled(self) -> list[str]:
        """Return the tasks of which a rank has a label in this micro-step."""
        return [
            t for t, of_ranks in zip(self.tasks, zip(*self._counts.rows, strict=True), strict=True) if any(of_ranks)
        ]

    def _run(self, losses: Mapping[str, Any], weights: Mapping[str, float], run: Backward) -> None:
        self._check_graphs(losses)
        active = self._labelled()
        for place, task in enumerate(active):
            self._combiner.begin(task)
            self._heads.begin(task)
            part = None if losses[task] is None else losses[task].reshape(()) * weights[task]
            retain = any(losses[other] is not None for other in active[place + 1 :])
            self._average(part, self._alike[self.tasks.index(task)], run, retain)
            if part is not None and weights[task]:
                self._losses[task] += part.detach().float()
            if self.micro_steps > 1:
                self._exact.accumulate(task)
            else:
                with torch.no_grad():
                    self._exact.add(task, self._losses[task], self._counts.units()[self.tasks.index(task)])
            self._heads.end(keep=True)

    def _check_graphs(self, losses: Mapping[str, Tensor | None]) -> None:
        """Raise if the losses do not come from one forward, in the first micro-step with these tasks.

        Raises:
            BalancerError: the graph of one has nothing in common with those of the others.
        """
        given = {task: loss for task, loss in losses.items() if loss is not None}
        if self._heads.shares and not self._heads.met.issuperset(given):  # on a frozen backbone no graphs meet
            check_one_forward(given)
            self._heads.met.update(given)


class JointAtFeatures(JointTasks):
    """Several tasks of a step whose losses come from one forward, balanced at the features: one backward in all.

    Args:
        tasks: names of the T tasks.
        micro_steps: number of forwards.
        combiner: takes the sum of the tasks' gradients.
        heads: records which head parameters the tasks use.
        agreement: with the other ranks; None: they are not asked.
        weighting: turns the record of a micro-step into factors.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        micro_steps: int,
        combiner: ExactCombiner | FeaturesCombiner,
        heads: HeadUse,
        agreement: Agreement | None,
        weighting: Weighting,
    ):
        super().__init__(tasks, micro_steps, combiner, heads, agreement)
        self._taker = combiner
        self._every_head |= isinstance(combiner, FeaturesCombiner)
        shared = combiner.adapter.shared
        self._block = FeatureBlock(tasks, weighting, micro_steps, checked=heads.marked, backbone=shared)

    def forwards(self) -> contextlib.AbstractContextManager[None]:
        return self._block.active()

    def _flags(self, losses: Mapping[str, Tensor | None]) -> list[int]:
        return [*super()._flags(losses), self._block.order()]

    def hand_over(self) -> None:
        found = self._block.means()
        if found:
            self._taker.add_balanced(self.name, found)
            self._heads.divide(self.name, tuple(found))

    def _run(self, losses: Mapping[str, Any], weights: Mapping[str, float], run: Backward) -> None:
        self._combiner.begin(self.name)
        self._heads.begin(self.name)
        counts = list(zip(*self._counts.rows, strict=True))  # of each task on every rank
        labels = [(of_ranks[rank()], sum(of_ranks)) for of_ranks in counts]
        labelled = {task: losses[task] if sum(n) else None for task, n in zip(self.tasks, counts, strict=True)}
        with self._block.micro_step(labelled, None, self._combiner.adapter.loss_scale, labels) as total:
            if isinstance(self._taker, FeaturesCombiner):  # it joins the step's other tasks in the engine
                self._refuse_orders()
                run(total, False)
            else:
                self._average(total, all(self._alike), run)
        if self.micro_steps > 1 and isinstance(self._taker, ExactCombiner):
            self._taker.accumulate(self.name)
        self._heads.end(keep=True)

    def _refuse_orders(self) -> None:
        """Raise if ranks have run the heads in different orders and the engine reduces in the order of the backward."""
        if self._taker.reduces_in_order and not all(self._alike):
            raise BalancerError(
                f"ranks run the heads of the joint block '{self.name}' in different orders, and with norm='features' "
                f"gradients of ZeRO-{self._taker.adapter.stage} are reduced in the order of the backward; run them in "
                "one order on every rank, or use norm='exact'"
            )


class TaskAtFeatures(JointAtFeatures):
    """One task of a step, balanced at the features: `norm="features"`.

    Args:
        name: of the task.
        micro_steps: number of micro-batches.
        combiner: takes the gradient of the step.
        heads: records which head parameters the task uses.
        agreement: with the other ranks; None: they are not asked.
        weighting: turns the record of a micro-step into a factor.
    """

    def __init__(
        self,
        name: str,
        micro_steps: int,
        combiner: FeaturesCombiner,
        heads: HeadUse,
        agreement: Agreement | None,
        weighting: Weighting,
    ):
        super().__init__((name,), micro_steps, combiner, heads, agreement, weighting)

    def backward(self, loss: Any, count: Any, run: Backward) -> None:
        """Run the backward of the next micro-step.

        Args:
            loss: mean over this rank's labels, scalar.
            count: number of these labels; None: ranks count the same.
            run: the engine's backward.
        """
        check_loss(self.name, loss)
        super().backward({self.name: loss}, None if count is None else {self.name: count}, run)

    def _weights(self, losses: Mapping[str, Tensor | None], count: Any) -> dict[str, float]:
        if count is not None:
            return super()._weights(losses, count)
        self._counts.rows, self._alike = [[1]] * world_size(), [True]  # every rank has a loss
        return {self.name: 1.0}


def joint_tasks(
    tasks: Sequence[str],
    micro_steps: int,
    at: str,
    combiner: Combiner,
    heads: HeadUse,
    agreement: Agreement | None,
    weighting: Weighting,
) -> JointTasks:
    """Return what runs a joint block.

    Raises:
        ConfigError: an unknown place, a weighting that cannot be computed at the features, or a combiner that cannot
            serve joint blocks.
    """
    if at not in PLACES:
        raise ConfigError(f"balancer.joint(at={at!r}); {did_you_mean(str(at), PLACES)}")
    at = at if heads.shares else "backbone"  # no gradient comes back to the features of a frozen backbone
    if isinstance(combiner, FeaturesCombiner):
        if at == "backbone":
            raise ConfigError(
                "balancer.joint(at='backbone') with norm='features', which measures at the features; pass "
                "at='features', or construct the TaskBalancer with norm='exact'"
            )
        return JointAtFeatures(tasks, micro_steps, combiner, heads, agreement, weighting)
    exact = require_exact(combiner, "balancer.joint()")
    if at == "backbone":
        return JointAtBackbone(tasks, micro_steps, exact, heads, agreement)
    return JointAtFeatures(tasks, micro_steps, exact, heads, agreement, feature_weighting(weighting))


def single_task(
    name: str,
    micro_steps: int,
    combiner: Combiner,
    heads: HeadUse,
    agreement: Agreement | None,
    weighting: Weighting,
) -> RunningTask:
    """Return what runs a block of one task."""
    if isinstance(combiner, FeaturesCombiner):
        return TaskAtFeatures(name, micro_steps, combiner, heads, agreement, weighting)
    return RunningTask(name, micro_steps, combiner, agreement)


def _nothing(engine: Any) -> Tensor:
    """Return a loss of zero that depends on the trainable parameters."""
    params = [p for p in engine.module.parameters() if p.requires_grad]
    return sum((p.reshape(-1)[:1].float().sum() for p in params), torch.zeros((), device=engine.device)) * 0.0
