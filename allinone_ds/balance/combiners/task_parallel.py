"""Tasks on different ranks in the same step: norms within a task's group of ranks, one reduce over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.arithmetic import scale_or_zero, square_norm
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.base import Combined
from allinone_ds.balance.combiners.sketched import LocalCombiner
from allinone_ds.balance.weightings.base import StepRecord, Weighting
from allinone_ds.errors import BalancerError, UnsupportedEngine
from allinone_ds.zero.engines.base import GradientShards

BUCKET = 1 << 22
"""Elements of a gradient that a group sums at a time to measure it (16 MiB)."""


class GroupedCombiner(LocalCombiner):
    """Every rank runs its group's tasks only; nothing is sent before the step.

    A task's gradient is the mean over all micro-steps of its ranks, which may differ in number between ranks. In the
    step the ranks of a group measure their tasks' gradients (exactly: a reduce-scatter within the group, of which
    only norms are kept; or from sketches), all ranks learn all norms from one small all-reduce, every rank scales what
    it has by c_t * R * (its part of the task's micro-steps), and the engine averages once over all R ranks.

    Args:
        norm: "exact" or "sketch".
        groups: which ranks run which task.
        agreement: names are `groups.tasks`.

    Raises:
        UnsupportedEngine: ZeRO-3, or an engine that cannot keep gradients on the rank.
    """

    def __init__(
        self,
        shards: GradientShards,
        weighting: Weighting,
        norm: str,
        size: int | None,
        groups: TaskGroups,
        agreement: Agreement,
    ):
        if shards.engine.zero_optimization_stage() == 3:
            raise UnsupportedEngine(
                "parallel='tasks' cannot run on ZeRO-3: every forward gathers parameters from all ranks, so ranks in "
                "different tasks would wait for each other for ever; use ZeRO-1 or ZeRO-2, or parallel='data'"
            )
        super().__init__(shards, weighting, size)
        self.exact = norm == "exact"
        self.agreement = agreement
        self.rank = dist.get_rank()
        self._held: dict[str, dict[int, Tensor]] = {}  # own task -> parameter -> gradient
        self._losses: dict[str, Tensor] = {}
        self._ran: tuple[str, ...] = ()
        self._parts: dict[str, float] = {}  # own task -> this rank's part of its micro-steps
        self._made: dict[tuple[int, ...], Any] = {}  # process groups, by ranks
        self.regroup(groups)

    def regroup(self, groups: TaskGroups) -> None:
        """Divide the ranks anew, between steps. Collective."""
        if not self.agreement.same([r in ranks for ranks in groups.ranks.values() for r in range(groups.world)]):
            raise ValueError("groups are not the same on all ranks; derive them from nothing that differs between them")
        self.groups = groups
        for ranks in groups.members:  # every rank makes all of them, in the same order
            if self.exact and 1 < len(ranks) < self.world and ranks not in self._made:
                self._made[ranks] = dist.new_group(list(ranks))

    @property
    def norm_error(self) -> float:
        return 0.0 if self.exact else super().norm_error

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.records) or tuple(self._held)

    @property
    def bytes(self) -> int:
        sketches = 0 if self.exact else 2 * 4 * self.sketcher.size * len(self.groups.tasks)
        return super().bytes + self._kept_bytes(len(self.groups.of(self.rank)) - 1) + sketches

    def add(self, task: str, loss: Tensor) -> None:
        held = {}
        for index in range(len(self.local.params)):
            gradient = self.local.get(index)
            if gradient is not None:
                held[index] = gradient
                self.local.set(index, None)
        self._held[task], self._losses[task] = held, loss

    def agree(self, micro_steps: dict[str, int]) -> tuple[str, ...]:
        every = self.agreement.rows([micro_steps.get(task, 0) for task in self.groups.tasks])
        self._ran, self._parts = (), {}
        ran = []
        for number, (task, ranks) in enumerate(self.groups.ranks.items()):
            counts = {rank: every[rank][number] for rank in ranks}
            if any(counts.values()):
                ran.append(task)
                lazy = [rank for rank, count in counts.items() if not count]
                if lazy:
                    raise BalancerError(
                        f"task '{task}' ran on rank(s) {_listed(set(ranks) - set(lazy))} and not on {_listed(lazy)}; "
                        f"it is to run on ranks {_listed(ranks)}: loop over balancer.tasks on every rank"
                    )
                if self.rank in ranks:
                    self._parts[task] = counts[self.rank] / sum(counts.values())
        self._ran = tuple(ran)
        return self._ran

    def finish(self) -> Combined:
        sketches = self._sketched() if self.watch or not (self.exact and self.weighting.streams) else None
        sums = torch.zeros(len(self._ran), 3, dtype=torch.float64, device=self.sketcher.device)
        for row, task in zip(sums, self._ran, strict=True):
            if task in self._held:
                if self.exact:
                    row[0], row[1] = self._squares(task)
                row[2] = self._losses[task] * self._parts[task]
        if self.world > 1:
            dist.all_reduce(sums)
        if not self.exact:
            assert sketches is not None
            sums[:, :2] = sketches.square().sum(2)
        for task, (square, other, loss) in zip(self._ran, sums, strict=True):
            self.records[task], self.finite[task] = self._record_of(task, square, square + other, loss)
        skipped, overflow = self._verdicts()
        used = [task for task in self._ran if task not in skipped]
        self.factors = {task: torch.zeros_like(self.records[task].losses[0]) for task in self._ran}
        if sketches is not None:
            self._gram = self._exact_diagonal(self._gram_of(sketches[:, 0], summed=True))
        if used and not overflow:
            self.factors.update(self._factors_of_used(used))
        self.local.begin()  # a rank whose tasks did not run has not begun
        self._hand_over(used)
        return self._reduced(skipped, overflow, usable=bool(used))

    def _squares(self, task: str) -> tuple[Tensor, Tensor]:
        """This rank's part of the squared norm of a task's gradient: on the backbone, and elsewhere."""
        held = self._held[task]
        if len(self.groups.ranks[task]) == 1:
            mine = [(self.shared[index], gradient.reshape(-1)) for index, gradient in held.items()]
            shared, other = ([g for is_shared, g in mine if is_shared == kind] for kind in (True, False))
            return square_norm(shared, self.sketcher.device), square_norm(other, self.sketcher.device)
        group = self._made.get(self.groups.ranks[task])  # None: all ranks
        there = torch.tensor([index in held for index in range(len(self.shared))], dtype=torch.int32)
        there = there.to(self.sketcher.device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=group)

        def contribution(index: int) -> Tensor:
            if index in held:
                return held[index].reshape(-1).float() * self._parts[task]
            return torch.zeros(self.local.sizes[index], device=self.sketcher.device)

        found = [index for index, is_there in enumerate(there.tolist()) if is_there]
        backbone, heads = ([index for index in found if self.shared[index] == kind] for kind in (True, False))
        return self._scattered(map(contribution, backbone), group), self._scattered(map(contribution, heads), group)

    def _scattered(self, gradients: Iterable[Tensor], group: Any) -> Tensor:
        """Squared norm of this rank's part of the group's sum; collective in the group, in buckets."""
        square = torch.zeros((), dtype=torch.float64, device=self.sketcher.device)
        count = dist.get_world_size(group)
        for bucket in _buckets(gradients):
            flat = torch.cat(bucket)
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % count))
            mine = flat.new_empty(len(flat) // count)
            dist.reduce_scatter(mine, list(flat.chunk(count)), group=group)
            square += square_norm([mine], self.sketcher.device)
        return square

    def _sketched(self) -> Tensor:
        """Sketches of all tasks' gradients, the same on all ranks: (T, 2, k), of the backbone and elsewhere."""
        sketches = torch.zeros(len(self._ran), 2, self.sketcher.size, device=self.sketcher.device)
        for sketch, task in zip(sketches, self._ran, strict=True):
            if task in self._held:
                for index, gradient in self._held[task].items():
                    self.sketcher.add(sketch[0 if self.shared[index] else 1], index, gradient)
                sketch *= self._parts[task]
        if self.world > 1:
            dist.all_reduce(sketches)
        return sketches.double()

    def _exact_diagonal(self, gram: Tensor) -> Tensor:
        """A sketched Gram matrix (T, T) with its cosines kept and the tasks' measured norms put in."""
        norms = torch.stack([self.records[task].norms[0] for task in self._ran]).to(gram)
        sketched = gram.diagonal().clamp(min=1e-60).sqrt()
        ratio = norms / sketched
        return gram * ratio[:, None] * ratio[None, :]

    def _factors_of_used(self, used: list[str]) -> dict[str, Tensor]:
        if self.weighting.streams:
            return {task: self.weighting.factors(self.records[task])[0] for task in used}
        assert self._gram is not None
        rows = torch.tensor([self._ran.index(task) for task in used], device=self._gram.device)
        return self._factors_of(
            StepRecord(
                tasks=tuple(used),
                gram=self._gram[rows][:, rows],
                whole_norms=torch.cat([self.records[task].whole_norms for task in used]),
                losses=torch.cat([self.records[task].losses for task in used]),
            )
        )

    def _hand_over(self, used: list[str]) -> None:
        """Give the engine this rank's scaled gradients, and zeros where only other ranks have one: all ranks reduce
        the same parameters in the same order."""
        sums: dict[int, Tensor] = {}
        for task in used:
            for index, gradient in self._held.pop(task, {}).items():
                factor = self.factors[task] if self._scales(index) else torch.ones_like(self.factors[task])
                scale = factor * (self.world * self._parts[task])
                scaled = scale_or_zero(gradient.to(self.local.dtype), scale, self.finite[task])
                sums[index] = sums[index].add_(scaled) if index in sums else scaled
        there = self.agreement.union([index in sums for index in range(len(self.shared))])
        for index, (param, is_there) in enumerate(zip(self.local.params, there, strict=True)):
            if is_there:
                zeros = None if index in sums else torch.zeros_like(param, dtype=self.local.dtype)
                self.local.set(index, sums.pop(index) if zeros is None else zeros)

    def drop(self) -> None:
        for index in range(len(self.local.params)):
            self.local.set(index, None)

    def clear(self) -> None:
        super().clear()
        self._held, self._losses, self._ran, self._parts = {}, {}, (), {}


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """1-D tensors in lists of about `BUCKET` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
