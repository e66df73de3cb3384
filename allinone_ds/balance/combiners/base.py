"""What every combiner does: takes one gradient per task from the engine and gives the engine their weighted sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import scale, square_norm
from allinone_ds.balance.combiners.outcome import Combined, Verdict
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.device_constants import copied_to
from allinone_ds.distributed import all_reduce, cpu_group, wait_for_device, world_size
from allinone_ds.zero.engines.base import EngineAdapter


class Combiner(ABC):
    """Takes one gradient per task from the engine and gives the engine their weighted sum.

    A step calls, per task: `begin`, the micro-steps, `add` (or `drop`); then `finish` and, when there is something to
    step on, `hand_over`; and `clear`.

    Args:
        adapter: of the engine.
        weighting: turns the record of the step into factors.
        order: names of all tasks; records and Gram matrices follow it, in whatever order the tasks ran.

    Attributes:
        watch: whether this step has to return the tasks' Gram matrix.
        records: record of each task that was added since the last `clear`.
        usable: whether the gradient of each task is to be used, 0-dim bool on the device.
        factors: of each task, 0-dim.
        wait: waits for work in which other ranks take part, and raises if they do not; None: nobody watches them.
    """

    watch: bool = False

    def __init__(self, adapter: EngineAdapter, weighting: Weighting, order: tuple[str, ...]):
        self.adapter = adapter
        self.weighting = weighting
        self.order = order
        self.is_shared = [piece.shared for piece in adapter.pieces]
        self.world = world_size()
        self.records: dict[str, StepRecord] = {}
        self.usable: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.wait: Callable[[Any], None] | None = None
        self._cpu_group = cpu_group() if weighting.on_cpu else None
        self._kept: list[list[Tensor]] = []
        self._sum: list[Tensor] = []
        self._gram: Tensor | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks added since the last `clear`, in the order in which they were declared."""
        return tuple(task for task in self.order if task in self.records)

    @property
    def reduces_in_order(self) -> bool:
        """Whether ranks reduce gradients in the order in which a backward yields them, which must be one order."""
        return self.adapter.stage >= 2

    @property
    def bytes(self) -> int:
        """Bytes of the flat tensors kept on this rank."""
        return sum(flat.numel() * flat.element_size() for flats in self._kept for flat in flats)

    def begin(self, task: str) -> None:
        """Make the next backward the first of a task."""
        self.adapter.begin_task()

    def before_backward(self) -> None:
        """Raise if the next backward would not average its gradient over ranks."""
        self.adapter.refuse_no_sync()

    def reduces(self, last: bool) -> bool:
        """Return whether the engine reduces gradients in a micro-step that is, or is not, the last of its task."""
        return last

    def communicates(self, last: bool) -> bool:
        """Return whether a backward that is, or is not, the last of its task is a collective operation."""
        return self.reduces(last) or self.adapter.stage >= 2

    def drop(self) -> None:
        """Forget the gradient of the current task."""
        self.adapter.discard()

    def reset(self) -> None:
        """Forget every gradient of the step, wherever it was given up."""
        self.drop()

    def agree(self, micro_steps: Mapping[str, int]) -> tuple[str, ...]:
        """Return the tasks that ran in this step, on any rank.

        Args:
            micro_steps: task -> micro-steps that this rank ran.
        """
        return self.tasks

    @abstractmethod
    def add(self, task: str, loss: Tensor) -> None:
        """Take a task's averaged gradient from the engine.

        Args:
            task: its name.
            loss: mean over the task's micro-steps on this rank, 0-dim.
        """

    @abstractmethod
    def finish(self) -> Combined:
        """Compute the weighted sum of all tasks added.

        Waits for the device once, to learn which tasks are not finite.
        """

    def nothing_ran(self) -> Combined:
        """Return what became of a step in which no rank has a label of any task: nothing to step on."""
        return self._combined([], (), overflow=False, usable=False)

    def hand_over(self, overflow: bool) -> None:
        """Give the engine the sum for its next step."""
        self.adapter.set_gradient(self._sum, overflow)

    def clear(self) -> None:
        """Prepare for a new step."""
        self.records.clear()
        self.usable.clear()
        self.factors = {}
        self._gram = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a step takes over from the one before; empty where norms are exact."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - see `state_dict`
        """Restore, between steps, what `state_dict` returned."""

    def close(self) -> None:
        """Leave the engine as it was found."""
        self.drop()
        self.clear()

    def _new_flats(self) -> list[Tensor]:
        flats = [torch.zeros(n, device=self.adapter.device, dtype=self.adapter.dtype) for n in self.adapter.sizes]
        self._kept.append(flats)
        return flats

    def _split(self, pieces: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the pieces of the shared backbone, and all others."""
        marked = list(zip(pieces, self.is_shared, strict=True))
        return [p for p, is_shared in marked if is_shared], [p for p, is_shared in marked if not is_shared]

    def _measure(
        self, task: str, pieces: Sequence[Tensor], loss: Tensor, unit: float = 1.0
    ) -> tuple[StepRecord, Tensor]:
        """Return the norms of one task, from one all-reduce of three scalars, and whether its gradient is usable.

        The norm of a task's gradient on the backbone is computed here: the sum of squares of this rank's pieces, summed
        over ranks.
        """
        shared, other = self._split(pieces)
        square = square_norm(shared, self.adapter.device)
        whole = square + square_norm(other, self.adapter.device)
        squares = copied_to(torch.stack([square, whole]), loss.device)
        if self.adapter.replicated:
            squares = squares / self.world
        sums = torch.cat([squares, loss.double().view(1)])
        square, whole, loss = all_reduce(sums)
        if unit != 1.0:
            square, whole, loss = square * unit**2, whole * unit**2, loss * unit
        return self._record_of(task, square, whole, loss / self.world)

    def _record_of(self, task: str, square: Tensor, whole: Tensor, loss: Tensor) -> tuple[StepRecord, Tensor]:
        """Return a task's record, and whether its gradient is usable.

        Args:
            task: its name.
            square, whole: squared norms on the backbone and everywhere, with loss scale, 0-dim.
            loss: mean over micro-steps and ranks, 0-dim.
        """
        norm, whole_norm = (torch.stack([square, whole]).sqrt() / self.adapter.loss_scale).float()
        usable = torch.isfinite(loss)
        if not self.adapter.fp16:  # in fp16 gradients overflow now and then, and the loss scaler handles that
            usable = usable & torch.isfinite(whole)
        return StepRecord((task,), norm.square().view(1, 1), whole_norm.view(1), loss.float().view(1)), usable

    def _with_factor(self, record: StepRecord, usable: Tensor, factor: Tensor) -> Tensor:
        """Return whether a task's gradient is still usable with its factor: an overflow is no fault of the factor."""
        return usable & (torch.isfinite(factor) | ~torch.isfinite(record.whole_norms[0]))

    def _joint_record(self, tasks: Sequence[str], gram: Tensor) -> StepRecord:
        """Return the record of several tasks from their own records and their Gram matrix (T, T)."""
        records = [self.records[task] for task in tasks]
        return StepRecord(
            tasks=tuple(tasks),
            gram=gram,
            whole_norms=torch.cat([record.whole_norms for record in records]),
            losses=torch.cat([record.losses for record in records]),
        )

    def _gram_of(self, sketches: Tensor, summed: bool) -> Tensor:
        """Return the Gram matrix (T, T) of the tasks from their sketches.

        Args:
            sketches: (T, k).
            summed: whether they are sums over ranks already.
        """
        sketches = sketches.to(self.adapter.compute_device)
        if not summed:
            all_reduce(sketches)
        sketches = sketches.double()
        return sketches @ sketches.T / self.adapter.loss_scale**2

    def _factors_of(self, record: StepRecord) -> Tensor:
        """Return the factors from a record of several tasks, (T,), on the device of the record.

        They are those of rank 0, since a method may draw at random or iterate.
        """
        factors = torch.full((len(record.tasks),), torch.nan, device=record.gram.device)
        try:
            factors.copy_(self.weighting.factors(record))
        finally:  # a rank whose weighting raises does not leave the others waiting
            if self.world > 1:
                self._send_from_first_rank(factors)
        return factors

    def _send_from_first_rank(self, factors: Tensor) -> None:
        """Give every rank the factors of rank 0, on the CPU or on the device. Collective."""
        if not factors.is_cpu or self.adapter.compute_device.type == "cpu":
            dist.broadcast(factors, 0)
            return
        work = dist.broadcast(factors, 0, group=self._cpu_group, async_op=True)
        (self.wait or _wait)(work)

    def _verdict(self, factors: Mapping[str, Tensor] | None = None) -> Verdict:
        """Return the verdict on a step; waits for the device, once.

        Args:
            factors: of some tasks, on the device.
        """
        factors = factors or {}
        skipped, overflow, fetched = self._fetch([torch.stack(list(factors.values()))] if factors else [])
        values = fetched[0] if fetched else ()
        on_cpu = {task: value for task, value in zip(factors, values, strict=True) if torch.isfinite(value)}
        return Verdict(skipped, overflow, {task: factors[task] for task in on_cpu}, on_cpu)

    def _joint_verdict(self, tasks: Sequence[str], gram: Tensor, partial: bool = True) -> Verdict:
        """Return the verdict on a step whose factors depend on all its tasks; waits for the device, once.

        The device computes the factors before it is known whether all tasks are finite; where some are not, it computes
        those of the others again, and this rank waits for the device a second time.

        Args:
            tasks: that get a factor.
            gram: their inner products, (T, T).
            partial: whether the step is taken without the tasks that are not finite; False: no factors then.
        """
        record = self._joint_record(tasks, gram)
        if self.weighting.on_cpu:
            return self._verdict_from_cpu(record, partial)
        before, failure = self.weighting.state_dict(), None
        try:
            factors = self._factors_of(record)
        except Exception as error:  # which may be because of a task that is not finite
            factors, failure = torch.full_like(record.losses, torch.nan), error
        verdict = self._verdict(dict(zip(tasks, factors, strict=True)))
        used = self._used(tasks, verdict.skipped, verdict.overflow, partial)
        if len(used) == len(tasks):
            if failure is not None:
                raise failure
            return verdict
        self.weighting.load_state_dict(before)
        if not used:
            return Verdict(verdict.skipped, verdict.overflow, {}, {})
        factors = self._factors_of(_rows(record, used))
        return self._verdict(dict(zip(used, factors, strict=True)))

    def _verdict_from_cpu(self, record: StepRecord, partial: bool) -> Verdict:
        """Return the verdict on a step whose factors are computed on the CPU, from a record on the device."""
        tasks = record.tasks
        skipped, overflow, fetched = self._fetch([record.gram, record.whole_norms, record.losses])
        used = self._used(tasks, skipped, overflow, partial)
        on_cpu: dict[str, Tensor] = {}
        if used:
            factors = self._factors_of(_rows(StepRecord(tasks, *fetched), used))
            on_cpu = {task: factor for task, factor in zip(used, factors, strict=True) if torch.isfinite(factor)}
        sent = copied_to(torch.stack(list(on_cpu.values())), self.adapter.compute_device) if on_cpu else ()
        return Verdict(skipped, overflow, dict(zip(on_cpu, sent, strict=True)), on_cpu)

    def _used(self, tasks: Sequence[str], skipped: Sequence[str], overflow: bool, partial: bool) -> list[str]:
        """Return the tasks that a step uses."""
        return [] if overflow or (skipped and not partial) else [task for task in tasks if task not in skipped]

    def _fetch(self, tensors: Sequence[Tensor]) -> tuple[tuple[str, ...], bool, list[Tensor]]:
        """Return what to skip, whether a gradient overflowed, and tensors of the device on the CPU in float64.

        They come with one transfer, for which this rank waits.
        """
        ran = self.tasks
        finite = torch.isfinite(torch.cat([self.records[task].whole_norms for task in ran]))
        flags = torch.stack([self.usable[task] for task in ran])
        parts = [flags, finite, *tensors]
        together = torch.cat([part.reshape(-1).double() for part in parts])
        if self.wait is not None:
            wait_for_device(self.wait, together.device)
        usable, finite, *fetched = together.cpu().split([part.numel() for part in parts])
        skipped = tuple(task for task, good in zip(ran, usable.tolist(), strict=True) if not good)
        overflow = self.adapter.fp16 and bool((usable > finite).any())
        return skipped, overflow, [row.view(part.shape) for row, part in zip(fetched, tensors, strict=True)]

    def _combined(
        self, flats: list[Tensor], skipped: tuple[str, ...], overflow: bool, usable: bool, norm_error: float = 0.0
    ) -> Combined:
        """Take `flats` as the step's sum, and scale it once more where the weighting does."""
        self._sum, scales = flats, self.factors
        factor = None
        if usable and not overflow and type(self.weighting).sum_factor is not Weighting.sum_factor:
            factor = self.weighting.sum_factor(self._norm(flats))  # a pass over the shard that most do not need
        if factor is not None:
            for flat in flats:
                scale(flat, factor.to(flat.device))
            scales = {task: own * factor.to(own.device) for task, own in scales.items()}
        return Combined(
            tasks=self.tasks,
            norms={task: record.norms[0] for task, record in self.records.items()},
            scales={t: torch.zeros_like(s) if t in skipped else s for t, s in scales.items()},
            losses={task: record.losses[0] for task, record in self.records.items()},
            whole_norms={task: record.whole_norms[0] for task, record in self.records.items()},
            skipped=skipped,
            overflow=overflow,
            usable=usable,
            norm_error=norm_error,
            gram=self._gram if not skipped and not overflow else None,
        )

    def _norm(self, flats: Sequence[Tensor]) -> Tensor:
        square = square_norm(flats, self.adapter.device)
        if not self.adapter.replicated:
            square = all_reduce(square.to(self.adapter.compute_device))
        return (square.sqrt() / self.adapter.loss_scale).float()


def _wait(work: Any) -> None:
    work.wait()


def _rows(record: StepRecord, tasks: Sequence[str]) -> StepRecord:
    """Return the record of some of its tasks."""
    if len(tasks) == len(record.tasks):
        return record
    rows = copied_to(torch.tensor([record.tasks.index(task) for task in tasks]), record.gram.device)
    return StepRecord(tuple(tasks), record.gram[rows][:, rows], record.whole_norms[rows], record.losses[rows])
