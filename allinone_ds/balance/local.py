"""Combiners that keep gradients on the rank over the step and reduce once; their norms come from sketches.

Each rank's gradients stay whole on that rank until the step, whatever the ZeRO stage, so these modes trade memory for
messages: one sketch a task (or a step) and one reduce a step, where exact norms need a reduce a task.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..strict import ConfigError
from ..zero import GradientShards, LocalGradients
from .arithmetic import scale_or_zero
from .combine import Combined, Combiner, exact_combiner
from .sketch import Sketcher, default_size, norm_error
from .weighting import StepRecord, Weighting


class LocalCombiner(Combiner):
    """What both modes share: local gradients, sketches of them, and the step's one reduce.

    Args:
        shards: the engine's gradient shards.
        weighting: what turns the record of the step into factors.
        size: length k of a sketch; None chooses by the number of parameters.
    """

    def __init__(self, shards: GradientShards, weighting: Weighting, size: int | None):
        super().__init__(shards, weighting)
        self.local = LocalGradients(shards.engine, shards)
        sizes = self.local.sizes
        self.sketcher = Sketcher(sizes, size or default_size(sum(sizes)), shards.engine.device)
        self.shared = [id(p) in shards.shared for p in self.local.params]
        self._flats: list[Tensor] = []
        self._steps = 0

    @property
    def norm_error(self) -> float:
        """Bound of the norms' relative standard error."""
        return norm_error(self.sketcher.size)

    def begin(self, task: str) -> None:
        self.local.begin()

    def reduces(self, last: bool) -> bool:
        return False

    def _kept_bytes(self, backbones: int) -> int:
        """Bytes of one whole gradient, and of further ones of the backbone."""
        shared = sum(size for size, is_shared in zip(self.local.sizes, self.shared, strict=True) if is_shared)
        return self.local.bytes + backbones * shared * self.local.dtype.itemsize

    def _scales(self, index: int) -> bool:
        """Whether a parameter's gradient gets its task's factor."""
        return self.shared[index] or self.weighting.heads == "same"

    def _reduced(self, skipped: tuple[str, ...], overflow: bool, usable: bool) -> Combined:
        """Reduce what is on the ranks, once, and take it as the step's sum."""
        self._flats = self._flats or self._new_flats()
        if usable:
            self.local.reduce()
            flats = iter(self.shards.take())
            for piece in self.shards.pieces:
                self._flats[piece.group].narrow(0, piece.start, piece.length).copy_(next(flats))
            self.shards.release()
        else:
            self.local.discard()
        return self._combined(self._flats, skipped, overflow, usable, self.norm_error)

    def clear(self) -> None:
        super().clear()
        self._steps += 1
        self.sketcher.renew(self._steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # else it comes from exact norms
            self._steps = state["steps"]
            self.sketcher.renew(self._steps)

    def close(self) -> None:
        self.local.discard()
        self.clear()


class SketchCombiner(LocalCombiner):
    """Norms of this step, estimated from sketches before the reduce; one reduce a step.

    Beside its gradients each rank keeps the sum of the tasks scaled so far, of the same size. Only for weightings that
    stream: the others would need T whole gradients on every rank.
    """

    def __init__(self, shards: GradientShards, weighting: Weighting, size: int | None):
        if not weighting.streams:
            raise ConfigError(
                f"norm='sketch' cannot serve {weighting!r}, which must see every task before it scales one: T "
                "gradients of the whole model would stay on every rank; use norm='delayed' or norm='exact'"
            )
        super().__init__(shards, weighting, size)
        self._held: dict[int, Tensor] = {}  # parameter -> the scaled sum so far
        self._sketches: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return super().bytes + self._kept_bytes(1) + 2 * 4 * self.sketcher.size

    def add(self, task: str, loss: Tensor) -> None:
        size = self.sketcher.size
        message = torch.zeros(2 * size + 1, device=self.sketcher.device)  # sketches: backbone, heads; loss
        found = []
        for index, is_shared in enumerate(self.shared):
            gradient = self.local.get(index)
            if gradient is not None:
                found.append((index, gradient))
                self.sketcher.add(message[:size] if is_shared else message[size : 2 * size], index, gradient)
        message[-1] = loss
        if self.world > 1:
            dist.all_reduce(message)
        if self.watch:
            self._sketches.append(message[:size] / self.world)
        square, other = (message[: 2 * size].view(2, size).double() / self.world).square().sum(1)
        record, finite = self._record_of(task, square, square + other, message[-1].double() / self.world)
        factor = self.weighting.factors(record)[0]
        for index, gradient in found:
            self.local.set(index, None)
            mine = factor if self._scales(index) else torch.ones_like(factor)
            scaled = scale_or_zero(gradient.to(self.local.dtype), mine, finite)
            self._held[index] = self._held[index].add_(scaled) if index in self._held else scaled
        self.records[task], self.finite[task], self.factors[task] = record, finite, factor

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        for index, gradient in self._held.items():
            self.local.set(index, gradient)
        self._held = {}
        if self._sketches:
            self._gram = self._gram_of(torch.stack(self._sketches), summed=True)
        return self._reduced(skipped, overflow, usable=len(skipped) < len(self.tasks))

    def drop(self) -> None:
        for index in range(len(self.local.params)):
            self.local.set(index, None)

    def clear(self) -> None:
        super().clear()
        self._held, self._sketches = {}, []


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
