"""Combiners with exact norms: the sum is streamed into one shard, or made from T shards that are kept."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import add_scaled, inner_products
from allinone_ds.balance.combiners.base import Combined, Combiner
from allinone_ds.balance.sketch import SMALLEST, Sketcher
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.zero.engines.base import GradientShards, cut


class StreamingCombiner(Combiner):
    """One extra shard whatever T is: each task is scaled and added as soon as it is done."""

    def __init__(self, shards: GradientShards, weighting: Weighting):
        super().__init__(shards, weighting)
        self.flats: list[Tensor] = []
        self._sketcher: Sketcher | None = None
        self._sketches: list[Tensor] = []
        self._draws = 0

    def add(self, task: str, loss: Tensor) -> None:
        self.flats = self.flats or self._new_flats()
        pieces = self.shards.take()
        record, finite = self._measure(task, pieces, loss)
        factor = self.weighting.factors(record)[0]
        on_shard = self.shards.device
        same_heads = self.weighting.heads == "same"
        shared, other = self._split(pieces)
        if self.watch:
            self._sketches.append(self._sketch(shared))
        shared_sum, other_sum = self._split(cut(self.flats, self.shards.pieces))
        usable = finite.to(on_shard)
        add_scaled(shared_sum, shared, factor.to(on_shard), usable)
        add_scaled(other_sum, other, factor.to(on_shard) if same_heads else torch.ones((), device=on_shard), usable)
        self.shards.release()
        self.records[task], self.finite[task], self.factors[task] = record, finite, factor

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        if self._sketches:
            self._gram = self._gram_of(torch.stack(self._sketches), summed=self.shards.replicated)
        return self._combined(self.flats, skipped, overflow, usable=len(skipped) < len(self.tasks))

    def _sketch(self, shared: list[Tensor]) -> Tensor:
        """A sketch of this rank's part of a task's gradient; the ranks' sketches add up to that of the whole."""
        if self._sketcher is None:
            self._sketcher = Sketcher([len(piece) for piece in shared], SMALLEST, self.shards.device)
        if not self._sketches:  # ranks hold different elements, so each draws its own signs; anew in every step
            self._draws += self.world
            self._sketcher.renew(self._draws + (0 if self.shards.replicated else dist.get_rank()))
        sketch = torch.zeros(self._sketcher.size, device=self.shards.device)
        for index, piece in enumerate(shared):
            self._sketcher.add(sketch, index, piece)
        return sketch

    def clear(self) -> None:
        super().clear()
        self._sketches = []
        for flat in self.flats:
            flat.zero_()


class KeepingCombiner(Combiner):
    """T extra shards: for weightings that must see every task before they scale one."""

    def __init__(self, shards: GradientShards, weighting: Weighting):
        super().__init__(shards, weighting)
        self.flats: dict[str, list[Tensor]] = {}
        self._spare: list[list[Tensor]] = []

    def add(self, task: str, loss: Tensor) -> None:
        flats = self._spare.pop() if self._spare else self._new_flats()
        pieces = self.shards.take()
        self.records[task], self.finite[task] = self._measure(task, pieces, loss)
        for target, piece in zip(cut(flats, self.shards.pieces), pieces, strict=True):
            target.copy_(piece)
        self.flats[task] = flats
        self.shards.release()

    def finish(self) -> Combined:
        skipped, overflow = self._verdicts()
        used = [task for task in self.tasks if task not in skipped]
        first = self.flats[used[0]] if used else self.flats[self.tasks[0]]
        self.factors = {task: torch.zeros_like(self.records[task].losses[0]) for task in self.tasks}
        if not used or overflow:
            return self._combined(first, skipped, overflow, usable=bool(used))
        record = self._record(used)
        self._gram = record.gram
        self.factors.update(self._factors_of(record))
        same_heads = self.weighting.heads == "same"
        for task in used:
            shared, other = self._split(cut(self.flats[task], self.shards.pieces))
            factor = self.factors[task].to(self.shards.device)
            for piece in [*shared, *(other if same_heads else [])]:
                piece.mul_(factor)
            if task != used[0]:
                for total, flat in zip(first, self.flats[task], strict=True):
                    total.add_(flat)
        return self._combined(first, skipped, overflow, usable=True)

    def _record(self, used: list[str]) -> StepRecord:
        """The record of the tasks in use, with the Gram matrix summed over ranks."""
        shared = [self._split(cut(self.flats[task], self.shards.pieces))[0] for task in used]
        gram = inner_products(shared, self.shards.device).to(self.shards.engine.device)
        if not self.shards.replicated and self.world > 1:
            dist.all_reduce(gram)
        return StepRecord(
            tasks=tuple(used),
            gram=gram / self.shards.loss_scale**2,
            whole_norms=torch.cat([self.records[task].whole_norms for task in used]),
            losses=torch.cat([self.records[task].losses for task in used]),
        )

    def clear(self) -> None:
        super().clear()
        self._spare += self.flats.values()
        self.flats = {}


def exact_combiner(shards: GradientShards, weighting: Weighting) -> Combiner:
    """The cheaper combiner with exact norms that serves `weighting`."""
    return (StreamingCombiner if weighting.streams else KeepingCombiner)(shards, weighting)
