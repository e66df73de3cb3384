"""TODO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.arithmetic import square_norm
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.zero.engines.base import GradientShards


@dataclass(frozen=True)
class Combined:
    """What became of each task in a step; fields as in `StepReport`."""

    tasks: tuple[str, ...]
    norms: dict[str, Tensor]
    scales: dict[str, Tensor]
    losses: dict[str, Tensor]
    whole_norms: dict[str, Tensor]
    skipped: tuple[str, ...]
    overflow: bool
    usable: bool
    """False when there is nothing that the optimizer should step on."""
    norm_error: float = 0.0
    gram: Tensor | None = None


class Combiner(ABC):
    """Takes one task's gradient after another and gives the engine their weighted sum.

    A step calls, per task: `begin`, the micro-steps, `add` (or `drop`); then `finish` and, when there is something to
    step on, `give`; and `clear`.

    Args:
        shards: the engine's gradient shards.
        weighting: what turns the record of the step into factors.
    """

    watch: bool = False
    """Whether this step is to give the tasks' Gram matrix."""

    def __init__(self, shards: GradientShards, weighting: Weighting):
        self.shards = shards
        self.weighting = weighting
        self.is_shared = [piece.shared for piece in shards.pieces]
        self.world = dist.get_world_size()
        self.records: dict[str, StepRecord] = {}
        self.finite: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self._kept: list[list[Tensor]] = []
        self._sum: list[Tensor] = []
        self._gram: Tensor | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks added since the last `clear`."""
        return tuple(self.records)

    @property
    def bytes(self) -> int:
        """Bytes of the flat tensors kept on this rank."""
        return sum(flat.numel() * flat.element_size() for flats in self._kept for flat in flats)

    def begin(self, task: str) -> None:
        """Make the next backward the first of a task."""
        self.shards.begin_task()

    def reduces(self, last: bool) -> bool:
        """Whether the engine reduces gradients in a micro-step that is, or is not, the last of its task."""
        return last

    def drop(self) -> None:
        """Forget the gradient of the task that is under way."""
        self.shards.discard()

    def agree(self, micro_steps: dict[str, int]) -> tuple[str, ...]:
        """The tasks that ran in this step, on any rank. `micro_steps`: task -> how many this rank ran."""
        return self.tasks

    @abstractmethod
    def add(self, task: str, loss: Tensor) -> None:
        """Take a task's averaged gradient from the engine. `loss`: its mean over micro-steps on this rank, 0-dim."""

    @abstractmethod
    def finish(self) -> Combined:
        """Make the weighted sum of all tasks added; waits for the device once, to learn which were not finite."""

    def give(self, overflow: bool) -> None:
        """Give the engine the sum for its next step."""
        self.shards.put(self._sum, overflow)

    def clear(self) -> None:
        """Begin a new step."""
        self.records.clear()
        self.finite.clear()
        self.factors = {}
        self._gram = None

    def state_dict(self) -> dict[str, Any]:
        """What a step takes over from the one before; empty where norms are exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - see `state_dict`
        """Take over, between steps, what `state_dict` gave."""

    def close(self) -> None:
        """Leave the engine as it was found."""
        self.drop()
        self.clear()

    def _new_flats(self) -> list[Tensor]:
        flats = [torch.zeros(n, device=self.shards.device, dtype=self.shards.dtype) for n in self.shards.sizes]
        self._kept.append(flats)
        return flats

    def _split(self, pieces: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pieces of the shared backbone, and all others."""
        marked = list(zip(pieces, self.is_shared, strict=True))
        return [p for p, is_shared in marked if is_shared], [p for p, is_shared in marked if not is_shared]

    def _measure(self, task: str, pieces: list[Tensor], loss: Tensor) -> tuple[StepRecord, Tensor]:
        """One task's record, from one all-reduce of three scalars, and whether its gradient is to be used."""
        shared, other = self._split(pieces)
        square = square_norm(shared, self.shards.device)
        whole = square + square_norm(other, self.shards.device)
        sums = torch.stack([square.to(loss.device), whole.to(loss.device), loss.double()])
        if self.shards.replicated:
            sums[:2] /= self.world
        if self.world > 1:
            dist.all_reduce(sums)
        return self._record_of(task, sums[0], sums[1], sums[2] / self.world)

    def _record_of(self, task: str, square: Tensor, whole: Tensor, loss: Tensor) -> tuple[StepRecord, Tensor]:
        """A task's record from squared norms (with loss scale) and mean loss; and whether to use its gradient."""
        norm, whole_norm = (torch.stack([square, whole]).sqrt() / self.shards.loss_scale).float()
        finite = torch.isfinite(loss)
        if not self._fp16:  # in fp16 a gradient overflows now and then: that is the loss scaler's business
            finite = finite & torch.isfinite(whole)
        return StepRecord((task,), norm.square().view(1, 1), whole_norm.view(1), loss.float().view(1)), finite

    def _gram_of(self, sketches: Tensor, summed: bool) -> Tensor:
        """Gram matrix (T, T) from the tasks' sketches (T, k), which are `summed` over ranks already or not."""
        sketches = sketches.to(self.shards.engine.device)
        if not summed and self.world > 1:
            dist.all_reduce(sketches)
        sketches = sketches.double()
        return sketches @ sketches.T / self.shards.loss_scale**2

    def _factors_of(self, record: StepRecord) -> dict[str, Tensor]:
        """Factors from a record of several tasks: rank 0's, since a method may draw at random or solve iteratively."""
        factors = self.weighting.factors(record).to(self.shards.engine.device, torch.float32)
        if self.world > 1:
            dist.broadcast(factors, 0)
        return dict(zip(record.tasks, factors, strict=True))

    @property
    def _fp16(self) -> bool:
        return bool(self.shards.engine.fp16_enabled())

    def _verdicts(self) -> tuple[tuple[str, ...], bool]:
        """Tasks to leave out, and whether an fp16 gradient overflowed; the step's one wait for the device."""
        rows = torch.stack(
            [torch.stack([self.finite[t], torch.isfinite(r.whole_norms[0])]) for t, r in self.records.items()]
        ).tolist()
        skipped = tuple(task for task, (finite, _) in zip(self.tasks, rows, strict=True) if not finite)
        return skipped, self._fp16 and any(finite and not small for finite, small in rows)

    def _combined(
        self, flats: list[Tensor], skipped: tuple[str, ...], overflow: bool, usable: bool, norm_error: float = 0.0
    ) -> Combined:
        """Take `flats` as the step's sum, and scale it once more where the weighting does."""
        self._sum, scales = flats, self.factors
        factor = None
        if usable and not overflow and type(self.weighting).sum_factor is not Weighting.sum_factor:
            factor = self.weighting.sum_factor(self._norm(flats))  # a pass over the shard that most need not take
        if factor is not None:
            for flat in flats:
                flat.mul_(factor)
            scales = {task: scale * factor.to(scale.device) for task, scale in scales.items()}
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

    def _norm(self, flats: list[Tensor]) -> Tensor:
        square = square_norm(flats, self.shards.device)
        if not self.shards.replicated and self.world > 1:
            square = square.to(self.shards.engine.device)
            dist.all_reduce(square)
        return (square.sqrt() / self.shards.loss_scale).float()
