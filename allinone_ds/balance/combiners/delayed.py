"""Factors from the norms of the step before; gradients are scaled as autograd gives them, one reduce per step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.combiners.base import Combined, Combiner
from allinone_ds.balance.combiners.exact import exact_combiner
from allinone_ds.balance.combiners.sketched import LocalCombiner
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.zero.engines.base import GradientShards


class DelayedCombiner(LocalCombiner):
    """Factors from the norms of the step before; gradients are scaled as autograd gives them, one reduce a step.

    The first step is exact, and so is each after a step that not every task took part in. Because all tasks meet in one
    gradient at once, a task cannot be left out afterwards: a step with a task that is not finite is not taken.

    Args:
        tasks: names of all tasks.
    """

    def __init__(self, shards: GradientShards, weighting: Weighting, size: int | None, tasks: tuple[str, ...]):
        super().__init__(shards, weighting, size)
        self.every = tasks
        self._next: dict[str, Tensor] = {}  # factors for the step to come; empty: it must be exact
        self._exact: Combiner | None = exact_combiner(shards, weighting)
        self._sketches: dict[str, Tensor] = {}  # task -> (2, k): backbone, heads
        self._losses: dict[str, Tensor] = {}
        self._task: str | None = None
        self._hooks = [p.register_hook(partial(self._seen, i)) for i, p in enumerate(self.local.params)]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._exact.tasks if self._exact else tuple(self._losses)

    @property
    def bytes(self) -> int:
        sketches = 2 * 4 * self.sketcher.size * len(self.every)
        return super().bytes + self._kept_bytes(0) + sketches + (self._exact.bytes if self._exact else 0)

    def begin(self, task: str) -> None:
        if self._exact:
            self._exact.watch = self.watch
            self._exact.begin(task)
            return
        super().begin(task)
        self._task = task
        self._sketches[task] = torch.zeros(2, self.sketcher.size, device=self.sketcher.device)

    def reduces(self, last: bool) -> bool:
        return self._exact.reduces(last) if self._exact else False

    def _seen(self, index: int, gradient: Tensor) -> Tensor | None:
        """A parameter's gradient in one micro-step, on its way into the sum of all tasks."""
        if self._task is None:
            return None
        self.sketcher.add(self._sketches[self._task][0 if self.shared[index] else 1], index, gradient)
        if not self._scales(index):
            return None
        return gradient * self.factors[self._task].to(gradient.dtype)

    def add(self, task: str, loss: Tensor) -> None:
        self._task = None
        if self._exact:
            self._exact.add(task, loss)
        else:
            self._losses[task] = loss

    def finish(self) -> Combined:
        if self._exact:
            result = self._exact.finish()
            self.records, self.finite, self._sum = self._exact.records, self._exact.finite, self._exact._sum
            self._plan(self._exact.factors if not (result.skipped or result.overflow) else {})
            return result
        return self._finish_delayed()

    def _finish_delayed(self) -> Combined:
        size, ran = self.sketcher.size, self.tasks
        message = torch.cat([*(self._sketches[t].view(-1) for t in ran), torch.stack([self._losses[t] for t in ran])])
        if self.world > 1:
            dist.all_reduce(message)
        sketches = (message[: -len(ran)].view(len(ran), 2, size) / self.world).double()
        self._gram = self._gram_of(sketches[:, 0], summed=True)
        squares = sketches.square().sum(2)  # (T, 2)
        losses = message[-len(ran) :].double() / self.world
        for row, task in enumerate(ran):
            square, other = squares[row]
            self.records[task], self.finite[task] = self._record_of(task, square, square + other, losses[row])
        skipped, overflow = self._verdicts()
        self.factors = {task: self.factors[task] for task in ran}
        result = self._reduced(skipped, overflow, usable=not skipped)
        self._plan({} if skipped or overflow else self._factors_from(self._gram))
        return result

    def _factors_from(self, gram: Tensor) -> dict[str, Tensor]:
        """Factors that this step's norms give the next."""
        records = self.records
        if self.weighting.streams:
            return {task: self.weighting.factors(record)[0] for task, record in records.items()}
        whole = StepRecord(
            tasks=tuple(records),
            gram=gram,
            whole_norms=torch.cat([r.whole_norms for r in records.values()]),
            losses=torch.cat([r.losses for r in records.values()]),
        )
        return self._factors_of(whole)

    def _plan(self, factors: dict[str, Tensor]) -> None:
        """Keep factors for the next step, if every task has one."""
        self._next = dict(factors) if set(factors) == set(self.every) else {}

    def drop(self) -> None:
        self._task = None
        if self._exact:
            self._exact.drop()
        else:  # all tasks are in one gradient: the step begins anew
            self.local.discard()
            self._losses, self._sketches = {}, {}

    def clear(self) -> None:
        if self._exact:
            self._exact.clear()
        super().clear()
        self._losses, self._sketches, self._task = {}, {}, None
        self._choose()

    def _choose(self) -> None:
        """Take the step to come from the factors that are known, or exactly."""
        self._exact = None if self._next else self._exact or exact_combiner(self.shards, self.weighting)
        self.factors = dict(self._next)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "next": dict(self._next)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._plan({task: factor.to(self.sketcher.device) for task, factor in state.get("next", {}).items()})
        self._choose()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().close()
