"""Gradients that were balanced at the features: they add up in the engine, as in plain accumulation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from allinone_ds.balance.arithmetic import square_norm
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.outcome import Combined
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.distributed import all_reduce
from allinone_ds.errors import BalancerError
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import cut


class FeaturesCombiner(Combiner):
    """Keeps nothing: the backwards of all tasks accumulate in the engine, which reduces as in plain accumulation.

    ZeRO-0 and 1 reduce once per step, ZeRO-2 and 3 in every backward. Because all tasks are in one gradient, a task
    cannot be left out afterwards: a step with a task that is not finite is not taken.

    Args:
        adapter: of the engine.
        weighting: turns the record of a task into its factor.
        order: names of all tasks.
    """

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self._begun = False
        self._holding: list[torch.nn.Parameter] = []  # parameters with a gradient of this step
        self._params = [p for p in adapter.engine.module.parameters() if p.requires_grad]

    def begin(self, task: str) -> None:
        self._check_kept()
        if not self._begun:
            self.adapter.begin_task()
        self._begun = True

    def reduces(self, last: bool) -> bool:
        return False

    def reset(self) -> None:
        self.drop()
        self._holding = []

    def add_balanced(self, key: str, tasks: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Record tasks whose gradient is in the engine.

        Args:
            key: name of their block.
            tasks: task -> its loss, norm at the features and factor, 0-dim.
        """
        for task, (loss, norm, factor) in tasks.items():
            self.records[task] = StepRecord((task,), norm.square().view(1, 1), norm.view(1), loss.view(1))
            self.factors[task] = factor
        self._holding = [p for p in self._params if p.grad is not None]

    def add(self, task: str, loss: Tensor) -> None:
        raise NotImplementedError  # blocks that balance at the features call `add_balanced`

    def finish(self) -> Combined:
        self._check_kept()
        self._holding = []
        self.adapter.reduce_accumulated()
        square = square_norm(self.adapter.gradient(), self.adapter.device).to(self.adapter.compute_device)
        whole = (square if self.adapter.replicated else all_reduce(square)).sqrt().float()
        finite = torch.isfinite(torch.stack([record.losses[0] + record.norms[0] for record in self.records.values()]))
        if self.adapter.fp16:  # gradients overflow now and then, and the loss scaler handles that
            usable = torch.isfinite(torch.cat([record.losses for record in self.records.values()]))
        else:  # if the sum alone is not finite, nobody knows because of which task
            usable = torch.where(finite.all(), torch.isfinite(whole), finite)
        for index, (task, record) in enumerate(self.records.items()):
            seen = torch.where(torch.isfinite(whole), record.norms[0], whole)
            self.records[task] = StepRecord((task,), record.gram, seen.view(1), record.losses)
            self.usable[task] = usable[index]
        verdict = self._verdict()
        return self._combined([], verdict.skipped, verdict.overflow, usable=not verdict.skipped)

    def nothing_ran(self) -> Combined:
        self.drop()
        return super().nothing_ran()

    def hand_over(self, overflow: bool) -> None:
        if not overflow and not self.adapter.needs_sum:
            return
        flats = [torch.zeros(n, device=self.adapter.device, dtype=self.adapter.dtype) for n in self.adapter.sizes]
        if not overflow:  # one at the features alone is not seen by the engine
            for target, piece in zip(cut(flats, self.adapter.pieces), self.adapter.gradient(), strict=True):
                target.copy_(piece)
            self.adapter.clear_gradient()
        self.adapter.set_gradient(flats, overflow)

    def clear(self) -> None:
        super().clear()
        if self._begun:
            self.adapter.clear_gradient()
        self._begun, self._holding = False, []

    def _check_kept(self) -> None:
        """Raise if gradients of this step's earlier tasks have been removed.

        Raises:
            BalancerError: as after `zero_grad()` of the module.
        """
        if any(param.grad is None for param in self._holding):
            raise BalancerError(
                "gradients of earlier tasks of this step are gone, as after zero_grad() of the module; with "
                "norm='features' they add up until balancer.step(), so remove the call"
            )
