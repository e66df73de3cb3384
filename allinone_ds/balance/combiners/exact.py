"""Combiners with exact norms: the sum is streamed into one shard, or computed from T shards that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allinone_ds.balance.arithmetic import add_scaled, inner_products
from allinone_ds.balance.combiners.base import Combined, Combiner
from allinone_ds.balance.combiners.sketch import SMALLEST, Sketcher
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.distributed import all_reduce, rank
from allinone_ds.zero.engines.base import EngineAdapter, cut


class StreamingCombiner(Combiner):
    """One extra shard for any T: each task is scaled and added as soon as it is done."""

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self.flats: list[Tensor] = []
        self._sketcher: Sketcher | None = None
        self._sketches: dict[str, Tensor] = {}
        self._draws = 0

    def add(self, task: str, loss: Tensor) -> None:
        self.flats = self.flats or self._new_flats()
        pieces = self.adapter.gradient()
        record, usable = self._measure(task, pieces, loss)
        factor = self.weighting.factors(record)[0]
        usable = self._with_factor(record, usable, factor)
        shared, other = self._split(pieces)
        if self.watch:
            self._sketches[task] = self._sketch(shared)
        shared_sum, other_sum = self._split(cut(self.flats, self.adapter.pieces))
        on_shard = self.adapter.device
        shared_factor, on_shard_usable = factor.to(on_shard), usable.to(on_shard)
        other_factor = shared_factor if self.weighting.heads == "same" else torch.ones((), device=on_shard)
        add_scaled(shared_sum, shared, shared_factor, on_shard_usable)
        add_scaled(other_sum, other, other_factor, on_shard_usable)
        self.adapter.clear_gradient()
        self.records[task], self.usable[task], self.factors[task] = record, usable, factor

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        if self._sketches:
            self._gram = self._gram_of(
                torch.stack([self._sketches[task] for task in self.tasks]), summed=self.adapter.replicated
            )
        return self._combined(self.flats, skipped, overflow, usable=len(skipped) < len(self.tasks))

    def _sketch(self, shared: Sequence[Tensor]) -> Tensor:
        """Return a sketch of this rank's part of a task's gradient; the sum over ranks is the sketch of the whole."""
        if self._sketcher is None:
            self._sketcher = Sketcher([len(piece) for piece in shared], SMALLEST, self.adapter.device)
        if not self._sketches:  # ranks hold different elements, so each draws its own signs, new ones in every step
            self._draws += self.world
            self._sketcher.renew(self._draws + (0 if self.adapter.replicated else rank()))
        sketch = torch.zeros(self._sketcher.size, device=self.adapter.device)
        for index, piece in enumerate(shared):
            self._sketcher.add(sketch, index, piece)
        return sketch

    def clear(self) -> None:
        super().clear()
        self._sketches = {}
        for flat in self.flats:
            flat.zero_()


class KeepingCombiner(Combiner):
    """T extra shards: for weightings that must see every task before they scale one."""

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self.flats: dict[str, list[Tensor]] = {}
        self._spare: list[list[Tensor]] = []

    def add(self, task: str, loss: Tensor) -> None:
        flats = self._spare.pop() if self._spare else self._new_flats()
        pieces = self.adapter.gradient()
        self.records[task], self.usable[task] = self._measure(task, pieces, loss)
        for target, piece in zip(cut(flats, self.adapter.pieces), pieces, strict=True):
            target.copy_(piece)
        self.flats[task] = flats
        self.adapter.clear_gradient()

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        used = [task for task in self.tasks if task not in skipped]
        first = self.flats[used[0]] if used else self.flats[self.tasks[0]]
        self.factors = {task: torch.zeros_like(self.records[task].losses[0]) for task in self.tasks}
        if not used or overflow:
            return self._combined(first, skipped, overflow, usable=bool(used))
        record = self._record(used)
        self._gram = record.gram
        factors = self._factors_of(record)
        skipped = tuple(task for task in self.tasks if task not in factors)
        used = [task for task in used if task in factors]
        if not used:
            return self._combined(first, skipped, overflow, usable=False)
        first = self.flats[used[0]]
        self.factors.update(factors)
        for task in used:
            shared, other = self._split(cut(self.flats[task], self.adapter.pieces))
            factor = self.factors[task].to(self.adapter.device)
            for piece in [*shared, *(other if self.weighting.heads == "same" else [])]:
                piece.mul_(factor)
            if task != used[0]:
                for total, flat in zip(first, self.flats[task], strict=True):
                    total.add_(flat)
        return self._combined(first, skipped, overflow, usable=True)

    def _record(self, used: Sequence[str]) -> StepRecord:
        """Return the record of the tasks in use, with the Gram matrix summed over ranks."""
        shared = [self._split(cut(self.flats[task], self.adapter.pieces))[0] for task in used]
        gram = inner_products(shared, self.adapter.device).to(self.adapter.compute_device)
        if not self.adapter.replicated:
            all_reduce(gram)
        return self._joint_record(used, gram / self.adapter.loss_scale**2)

    def clear(self) -> None:
        super().clear()
        self._spare += self.flats.values()
        self.flats = {}


def exact_combiner(adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]) -> Combiner:
    """Return the cheaper combiner with exact norms that serves `weighting`."""
    return (StreamingCombiner if weighting.streams else KeepingCombiner)(adapter, weighting, order)
