"""What every combiner does: takes one gradient per task from the engine and gives the engine their weighted sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import scale, square_norm
from allinone_ds.balance.report import StepReport
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.distributed import all_reduce, world_size
from allinone_ds.zero.engines.base import EngineAdapter


@dataclass(frozen=True)
class Combined:
    """What became of each task in a step; fields as in `StepReport`.

    Args:
        usable: False when there is nothing that the optimizer should step on.
    """

    tasks: tuple[str, ...]
    norms: dict[str, Tensor]
    scales: dict[str, Tensor]
    losses: dict[str, Tensor]
    whole_norms: dict[str, Tensor]
    skipped: tuple[str, ...]
    overflow: bool
    usable: bool
    norm_error: float = 0.0
    gram: Tensor | None = None

    def report(self, overflow: bool, applied: bool, watched: bool) -> StepReport:
        """Return the report of the step.

        Args:
            overflow: whether fp16 gradients overflowed, before or in the engine's step.
            applied: whether the optimizer changed the weights.
            watched: whether the report gets the Gram matrix.
        """
        return StepReport(
            norms=self.norms,
            scales=self.scales,
            losses=self.losses,
            whole_norms=self.whole_norms,
            skipped=self.skipped,
            overflow=overflow,
            applied=applied,
            tasks=self.tasks,
            gram=self.gram if watched else None,
            norm_error=self.norm_error,
        )


def _nothing(device: torch.device) -> None:
    pass


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
        before_verdict: called before this rank waits for the device, which may wait for other ranks.
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
        self.before_verdict: Callable[[torch.device], None] = _nothing
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

        Waits for the device once, to learn which tasks are not finite, and once more where factors are computed here.
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
        sums = torch.stack([square.to(loss.device), whole.to(loss.device), loss.double()])
        if self.adapter.replicated:
            sums[:2] /= self.world
        all_reduce(sums)
        return self._record_of(task, sums[0] * unit**2, sums[1] * unit**2, sums[2] * unit / self.world)

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

    def _factors_of(self, record: StepRecord) -> dict[str, Tensor]:
        """Return the finite factors from a record of several tasks; a task whose factor is not finite is absent.

        They are those of rank 0, since a method may draw at random or iterate.
        """
        factors = torch.full((len(record.tasks),), torch.nan, device=self.adapter.compute_device)
        try:
            factors.copy_(self.weighting.factors(record))
        finally:  # a rank whose weighting raises does not leave the others waiting
            if self.world > 1:
                dist.broadcast(factors, 0)
        return self._finite(dict(zip(record.tasks, factors, strict=True)))

    def _finite(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors that are finite; waits for the device."""
        finite = torch.isfinite(torch.stack(list(factors.values()))).tolist()
        return {task: factor for (task, factor), good in zip(factors.items(), finite, strict=True) if good}

    def _verdicts(self, factors: Mapping[str, Tensor] | None = None) -> tuple[tuple[str, ...], bool, dict[str, Tensor]]:
        """Return what must be known on the CPU before a step; waits for the device, once.

        Args:
            factors: of some tasks.

        Returns:
            The tasks to leave out, whether an fp16 gradient overflowed, and the factors that are finite.
        """
        factors = factors or {}
        ran = self.tasks
        flags = [self.usable[task] for task in ran]
        flags += [torch.isfinite(self.records[task].whole_norms[0]) for task in ran]
        flags += [torch.isfinite(factor) for factor in factors.values()]
        together = torch.stack(flags)
        self.before_verdict(together.device)
        answers = together.tolist()
        usable, finite = answers[: len(ran)], answers[len(ran) : 2 * len(ran)]
        skipped = tuple(task for task, good in zip(ran, usable, strict=True) if not good)
        overflow = self.adapter.fp16 and any(u and not f for u, f in zip(usable, finite, strict=True))
        good_factors = zip(factors.items(), answers[2 * len(ran) :], strict=True)
        return skipped, overflow, {task: factor for (task, factor), good in good_factors if good}

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
