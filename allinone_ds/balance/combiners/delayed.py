"""Factors from the norms of the step before; gradients are scaled as autograd gives them, one reduce per step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.exact import exact_combiner
from allinone_ds.balance.combiners.outcome import Combined
from allinone_ds.balance.combiners.sketch import held_bytes
from allinone_ds.balance.combiners.sketched import LocalCombiner
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.distributed import all_reduce
from allinone_ds.errors import BalancerError
from allinone_ds.zero.engines.base import EngineAdapter


class DelayedCombiner(LocalCombiner):
    """Factors from the norms of the step before; one reduce per step.

    The first step is exact. With a weighting that streams, steps are exact until every task has run, and a task that
    was absent has the factor of its last step. With others each step is exact that follows one in which not every task
    took part. Because all tasks are added into one gradient at once, a task cannot be left out afterwards: a step with
    a task that is not finite is not taken, and the next one is exact.

    Args:
        adapter: of the engine.
        weighting: turns the record of the step into factors.
        size: length k of a sketch; None chooses by the number of parameters.
        order: names of all tasks.
    """

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, size: int | None, order: tuple[str, ...]):
        super().__init__(adapter, weighting, size, order)
        self._next: dict[str, Tensor] = {}  # factors for the next step; empty: it must be exact
        self._known: dict[str, Tensor] = {}  # the last factor of each task, of a weighting that streams
        self._known_before: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # factors that this step was planned with
        self._exact: Combiner | None = exact_combiner(adapter, weighting, order)
        self._turns: dict[str, Tensor] = {}  # task -> (2, 2 k): backbone, heads
        self._losses: dict[str, Tensor] = {}
        self._task: str | None = None
        self._hooks = [p.register_hook(partial(self._scale, i)) for i, p in enumerate(self.local.params)]
        self._refuse_post_accumulate_hooks()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._exact.tasks if self._exact else tuple(task for task in self.order if task in self._losses)

    @property
    def bytes(self) -> int:
        sketches = held_bytes(self.sketcher.size) * len(self.order)
        return super().bytes + self._kept_bytes(0) + sketches + (self._exact.bytes if self._exact else 0)

    def begin(self, task: str) -> None:
        if self._exact:
            self._exact.watch, self._exact.wait = self.watch, self.wait
            self._exact.begin(task)
            return
        super().begin(task)
        self._task = task
        self._turns[task] = self.sketcher.empty(2)

    def before_backward(self) -> None:
        self._refuse_post_accumulate_hooks()
        if self._exact:
            self._exact.before_backward()
            return
        for index, (param, hook) in enumerate(zip(self.local.params, self._hooks, strict=True)):
            if next(reversed(param._backward_hooks or {}), None) != hook.id:
                hook.remove()  # the user has registered a hook since, which would change what has been measured
                self._hooks[index] = param.register_hook(partial(self._scale, index))

    def _refuse_post_accumulate_hooks(self) -> None:
        """Raise if a parameter has a hook that would get the sum of the scaled tasks in place of its own gradient."""
        for index, param in enumerate(self.local.params):
            if self.local.has_post_accumulate_hook(index):
                names = {id(p): name for name, p in self.adapter.engine.module.named_parameters()}
                raise BalancerError(
                    f"parameter '{names[id(param)]}' has a hook of register_post_accumulate_grad_hook; with "
                    "norm='delayed' it would get the scaled sum of all tasks so far: use register_hook, or norm='exact'"
                )

    def reduces(self, last: bool) -> bool:
        return self._exact.reduces(last) if self._exact else False

    def communicates(self, last: bool) -> bool:
        return self._exact.communicates(last) if self._exact else super().communicates(last)

    def reset(self) -> None:
        self._task, self._next, self._known = None, dict(self._before), dict(self._known_before)
        super().reset()
        if self._exact:
            self._exact.reset()

    def _scale(self, index: int, gradient: Tensor) -> Tensor | None:
        """Sketch and scale a parameter's gradient of one micro-step before it joins the sum of all tasks."""
        if self._task is None:
            return None
        exact = gradient.float()  # a 16-bit factor would be rounded
        self.sketcher.add(self._turns[self._task][0 if self.shared[index] else 1], index, exact)
        return (exact * self.factors[self._task]).to(gradient.dtype) if self._scales(index) else None

    def add(self, task: str, loss: Tensor) -> None:
        self._task = None
        if self._exact:
            self._exact.add(task, loss)
        else:
            self._losses[task] = loss

    def finish(self) -> Combined:
        if self._exact:
            result = self._exact.finish()
            self.records, self.usable, self._sum = self._exact.records, self._exact.usable, self._exact._sum
            self._plan(self._exact.factors if not (result.skipped or result.overflow) else {})
            return result
        return self._finish_delayed()

    def _finish_delayed(self) -> Combined:
        size, ran = self.sketcher.size, self.tasks
        sketches = self.sketcher.sketch(torch.stack([self._turns[task] for task in ran]))
        message = torch.cat([sketches.view(-1), torch.stack([self._losses[task] for task in ran])])
        all_reduce(message)
        sketches = (message[: -len(ran)].view(len(ran), 2, size) / self.world).double()
        self._gram = self._gram_of(sketches[:, 0], summed=True)
        squares = sketches.square().sum(2)  # (T, 2)
        losses = message[-len(ran) :].double() / self.world
        for row, task in enumerate(ran):
            square, other = squares[row]
            self.records[task], self.usable[task] = self._record_of(task, square, square + other, losses[row])
        before = self.weighting.state_dict()
        if self.weighting.streams:
            verdict = self._verdict({task: self.weighting.factors(record)[0] for task, record in self.records.items()})
        else:
            verdict = self._joint_verdict(ran, self._gram, partial=False)
        given_up = bool(verdict.skipped) or verdict.overflow
        if given_up:
            self.weighting.load_state_dict(before)
        self.factors = {task: self.factors[task] for task in ran}
        result = self._reduced(verdict.skipped, verdict.overflow, usable=not verdict.skipped)
        self._plan({} if given_up else verdict.factors)
        return result

    def _plan(self, factors: Mapping[str, Tensor]) -> None:
        """Keep factors for the next step, if every task has one."""
        if self.weighting.streams and factors:
            factors = self._known = {**self._known, **factors}
        self._next = dict(factors) if set(factors) == set(self.order) else {}

    def drop(self) -> None:
        self._task = None
        if self._exact:
            self._exact.drop()
        else:  # all tasks are in one gradient, so all of them must run again
            self.local.discard()
            self._losses, self._turns = {}, {}

    def clear(self) -> None:
        if self._exact:
            self._exact.clear()
        super().clear()
        self._losses, self._turns, self._task = {}, {}, None
        self._choose()

    def _choose(self) -> None:
        """Decide whether the next step uses the factors that are known, or is exact."""
        self._exact = None if self._next else self._exact or exact_combiner(self.adapter, self.weighting, self.order)
        self.factors, self._before, self._known_before = dict(self._next), dict(self._next), dict(self._known)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "next": dict(self._next or self._known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._plan({task: factor.to(self.sketcher.device) for task, factor in state.get("next", {}).items()})
        self._choose()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().close()
