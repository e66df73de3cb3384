"""Combiners with exact norms: the sum is streamed into one shard, or computed from T shards that are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allinone_ds.balance.arithmetic import add_scaled, inner_products, scale, scale_or_zero, square_norm
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.outcome import Combined, Verdict
from allinone_ds.balance.combiners.sketch import SMALLEST, Sketcher
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.device_constants import copied_to
from allinone_ds.distributed import all_reduce, rank
from allinone_ds.errors import ConfigError
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import cut


class ExactCombiner(Combiner):
    """Base of the combiners with exact norms; they also serve joint blocks and counted labels.

    Args:
        adapter: of the engine.
        weighting: turns the record of the step into factors.
        order: names of all tasks.
    """

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self._parts: dict[str, list[Tensor]] = {}  # task -> the sum of its micro-steps so far
        self._spare: list[list[Tensor]] = []
        self._left: Tensor | None = None  # whether to use the gradient that `add_balanced` has left in the engine

    def begin(self, task: str) -> None:
        self._take_left()
        super().begin(task)

    def accumulate(self, task: str) -> None:
        """Add the engine's gradient to that of the task's earlier micro-steps, and clear it."""
        pieces = self.adapter.gradient()
        first = task not in self._parts
        if first:
            self._parts[task] = self._flats()
        for total, piece in zip(cut(self._parts[task], self.adapter.pieces), pieces, strict=True):
            total.copy_(piece) if first else total.add_(piece)
        self.adapter.clear_gradient()

    @abstractmethod
    def add(self, task: str, loss: Tensor, unit: float = 1.0) -> None:
        """Take a task's averaged gradient, from the engine or from what `accumulate` has summed.

        Args:
            task: its name.
            loss: mean over the task's micro-steps on this rank, 0-dim.
            unit: what gradient and loss are multiplied by, equal on all ranks, so that they are means over the labels.
        """

    def add_balanced(self, key: str, tasks: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take the gradient of tasks that were balanced at the features already.

        They have one gradient, which is left out of the step as a whole if it is not finite. It stays in the engine
        unless a further gradient comes, so that a step of one such block makes no copy of it.

        Args:
            key: under which `accumulate` has summed the micro-steps, if there were several.
            tasks: task -> its loss, norm at the features and factor, 0-dim.
        """
        first, pieces = not self.records, self._pieces(key)
        square = square_norm(pieces, self.adapter.device).to(self.adapter.compute_device)
        whole = (square if self.adapter.replicated else all_reduce(square)).sqrt().float()
        losses = torch.stack([loss for loss, _, _ in tasks.values()])
        usable = torch.isfinite(losses).all()
        if not self.adapter.fp16:
            usable = usable & torch.isfinite(whole)
        for task, (loss, norm, factor) in tasks.items():
            seen = torch.where(torch.isfinite(whole), norm, whole)  # an overflow of fp16
            self.records[task] = StepRecord((task,), norm.square().view(1, 1), seen.view(1), loss.view(1))
            self.usable[task], self.factors[task] = usable, factor
        if first and key not in self._parts and not self.adapter.replicated and not self.adapter.needs_sum:
            self._left = usable
        else:  # without ZeRO it is where a stray backward of the user would change it
            self._add_raw(pieces, usable)
            self._release(key)

    @abstractmethod
    def _add_raw(self, pieces: Sequence[Tensor], usable: Tensor) -> None:
        """Add a gradient that is scaled already to the step's sum, or nothing unless `usable`."""

    def finish(self) -> Combined:
        verdict = self._judge()
        if verdict.overflow:  # the engine is told of it together with a gradient
            self._take_left()
        if self._left is not None:
            return self._combined([], verdict.skipped, verdict.overflow, usable=not verdict.skipped)
        return self._finish(verdict)

    def _judge(self) -> Verdict:
        """Return the verdict on the step; waits for the device."""
        return self._verdict()

    @abstractmethod
    def _finish(self, verdict: Verdict) -> Combined:
        """Compute the weighted sum of the tasks that were added and are not to be skipped."""

    def hand_over(self, overflow: bool) -> None:
        if self._left is None:
            super().hand_over(overflow)

    def clear(self) -> None:
        super().clear()
        if self._left is not None:
            self._left = None
            self.adapter.clear_gradient()
        self._spare += self._parts.values()
        self._parts = {}

    def _take_left(self) -> None:
        """Take the gradient that `add_balanced` has left in the engine."""
        if self._left is not None:
            usable, self._left = self._left, None
            self._add_raw(self.adapter.gradient(), usable)
            self.adapter.clear_gradient()

    def _flats(self) -> list[Tensor]:
        return self._spare.pop() if self._spare else self._new_flats()

    def _pieces(self, task: str) -> Sequence[Tensor]:
        """Return the gradient of a task, in the order of the adapter's pieces."""
        return cut(self._parts[task], self.adapter.pieces) if task in self._parts else self.adapter.gradient()

    def _release(self, task: str) -> None:
        """Forget the gradient that `_pieces` returned."""
        if task in self._parts:
            self._spare.append(self._parts.pop(task))
        self.adapter.clear_gradient()


class StreamingCombiner(ExactCombiner):
    """One extra shard for any T: each task is scaled and added as soon as it is done."""

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self.flats: list[Tensor] = []
        self._views: tuple[list[Tensor], list[Tensor]] | None = None  # of them: the shared backbone, and all others
        self._changed = False  # whether they hold anything but zeros
        self._sketcher: Sketcher | None = None
        self._sketches: dict[str, Tensor] = {}
        self._draws = 0

    def add(self, task: str, loss: Tensor, unit: float = 1.0) -> None:
        self.flats, self._changed = self.flats or self._new_flats(), True
        pieces = self._pieces(task)
        record, usable = self._measure(task, pieces, loss, unit)
        factor = self.weighting.factors(record)[0]
        usable = self._with_factor(record, usable, factor)
        shared, other = self._split(pieces)
        if self.watch:
            self._sketches[task] = self._sketch(shared).mul_(unit)
        self._views = self._views or self._split(cut(self.flats, self.adapter.pieces))
        shared_sum, other_sum = self._views
        on_shard = self.adapter.device
        shared_factor, on_shard_usable = torch.stack([factor.float(), usable.float()]).to(on_shard)  # one transfer
        on_shard_usable = on_shard_usable.bool()
        other_factor = shared_factor if self.weighting.heads == "same" else torch.ones((), device=on_shard)
        if unit != 1.0:
            shared_factor, other_factor = shared_factor * unit, other_factor * unit
        add_scaled(shared_sum, shared, shared_factor, on_shard_usable)
        add_scaled(other_sum, other, other_factor, on_shard_usable)
        self._release(task)
        self.records[task], self.usable[task], self.factors[task] = record, usable, factor

    def _add_raw(self, pieces: Sequence[Tensor], usable: Tensor) -> None:
        self.flats, self._changed = self.flats or self._new_flats(), True
        on_shard = self.adapter.device
        totals = cut(self.flats, self.adapter.pieces)
        add_scaled(totals, pieces, torch.ones((), device=on_shard), usable.to(on_shard))

    def _finish(self, verdict: Verdict) -> Combined:
        if self.watch and len(self._sketches) == len(self.tasks):  # balanced at the features: no sketch
            self._gram = self._gram_of(
                torch.stack([self._sketches[task] for task in self.tasks]), summed=self.adapter.replicated
            )
        usable = len(verdict.skipped) < len(self.tasks)
        return self._combined(self.flats, verdict.skipped, verdict.overflow, usable)

    def _sketch(self, shared: Sequence[Tensor]) -> Tensor:
        """Return a sketch of this rank's part of a task's gradient; the sum over ranks is the sketch of the whole."""
        if self._sketcher is None:
            self._sketcher = Sketcher([len(piece) for piece in shared], SMALLEST, self.adapter.device)
        if not self._sketches:  # ranks hold different elements, so each draws its own signs, new ones in every step
            self._draws += self.world
            self._sketcher.renew(self._draws + (0 if self.adapter.replicated else rank()))
        turns = self._sketcher.empty()
        for index, piece in enumerate(shared):
            self._sketcher.add(turns, index, piece)
        return self._sketcher.sketch(turns)

    def clear(self) -> None:
        super().clear()
        self._sketches = {}
        if self._changed:
            for flat in self.flats:
                flat.zero_()
        self._changed = False


class KeepingCombiner(ExactCombiner):
    """T extra shards: for weightings that must see every task before they scale one."""

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        super().__init__(adapter, weighting, order)
        self.flats: dict[str, list[Tensor]] = {}
        self._balanced: list[Tensor] | None = None  # of tasks that were balanced at the features

    def add(self, task: str, loss: Tensor, unit: float = 1.0) -> None:
        pieces = self._pieces(task)
        self.records[task], self.usable[task] = self._measure(task, pieces, loss, unit)
        self.flats[task] = self._parts.pop(task) if task in self._parts else self._copied(pieces)
        if unit != 1.0:
            for flat in self.flats[task]:
                flat.mul_(unit)
        self._release(task)

    def _add_raw(self, pieces: Sequence[Tensor], usable: Tensor) -> None:
        added = self._copied(pieces)
        for flat in added:
            scale_or_zero(flat, torch.ones((), device=flat.device), usable.to(flat.device))
        if self._balanced is None:
            self._balanced = added
            return
        for total, flat in zip(self._balanced, added, strict=True):
            total.add_(flat)
        self._spare.append(added)

    def _judge(self) -> Verdict:
        tasks = [task for task in self.tasks if task in self.flats]
        if not tasks:
            return self._verdict()
        shared = [self._split(cut(self.flats[task], self.adapter.pieces))[0] for task in tasks]
        gram = copied_to(inner_products(shared, self.adapter.device), self.adapter.compute_device)
        if not self.adapter.replicated:
            all_reduce(gram)
        self._gram = gram = gram / self.adapter.loss_scale**2
        return self._joint_verdict(tasks, gram)

    def _finish(self, verdict: Verdict) -> Combined:
        overflow = verdict.overflow
        unusable = [] if overflow else [task for task in self.flats if task not in verdict.factors]
        skipped = tuple(task for task in self.tasks if task in verdict.skipped or task in unusable)
        self.factors |= {task: torch.zeros_like(self.records[task].losses[0]) for task in self.flats}
        self.factors |= verdict.factors
        if overflow:
            parts = [self.flats[task] for task in self.tasks if task in self.flats and task not in skipped]
        else:
            parts = [self._scaled(task, verdict) for task in verdict.factors]
        parts += [self._balanced] if self._balanced is not None else []
        total = parts[0] if parts else next(iter(self.flats.values()))
        for part in parts[1:]:
            for flat, other in zip(total, part, strict=True):
                flat.add_(other)
        if len(verdict.factors) < len(self.tasks):
            self._gram = None
        return self._combined(total, skipped, overflow, usable=len(skipped) < len(self.tasks))

    def _copied(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        flats = self._flats()
        for target, piece in zip(cut(flats, self.adapter.pieces), pieces, strict=True):
            target.copy_(piece)
        return flats

    def _scaled(self, task: str, verdict: Verdict) -> list[Tensor]:
        """Return a task's gradient times its factor, in place."""
        shared, other = self._split(cut(self.flats[task], self.adapter.pieces))
        factor = (verdict.on_cpu if self.adapter.device.type == "cpu" else verdict.factors)[task]
        for piece in [*shared, *(other if self.weighting.heads == "same" else [])]:
            scale(piece, factor)
        return self.flats[task]

    def clear(self) -> None:
        super().clear()
        self._spare += [*self.flats.values(), *([] if self._balanced is None else [self._balanced])]
        self.flats, self._balanced = {}, None


def exact_combiner(adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]) -> ExactCombiner:
    """Return the cheaper combiner with exact norms that serves `weighting`."""
    return (StreamingCombiner if weighting.streams else KeepingCombiner)(adapter, weighting, order)


def require_exact(combiner: Combiner, what: str) -> ExactCombiner:
    """Return the combiner, if it can serve joint blocks and counted labels.

    Raises:
        ConfigError: norms are not exact, or tasks run on different ranks.
    """
    if not isinstance(combiner, ExactCombiner):
        raise ConfigError(
            f"{what} needs the gradient of each task by itself, averaged over all ranks, as norm='exact' with "
            "parallel='data' computes it (norm='features' serves it too); construct the TaskBalancer with them"
        )
    return combiner
