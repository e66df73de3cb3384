"""Tasks on different ranks in the same step: norms within a task's group of ranks, one reduce over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.arithmetic import square_norm
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.outcome import Combined
from allinone_ds.balance.combiners.sketch import held_bytes
from allinone_ds.balance.combiners.sketched import LocalCombiner
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.distributed import all_reduce, rank
from allinone_ds.errors import BalancerError
from allinone_ds.zero.engines.base import EngineAdapter

BUCKET = 1 << 22
"""Elements of a gradient that a group sums at a time to measure it (16 MiB)."""


class GroupedCombiner(LocalCombiner):
    """Every rank runs the tasks of its group only; nothing is sent before the step.

    The gradient of a task is the mean over all micro-steps of its ranks, which may differ in number between ranks. In
    the step, the ranks of a group measure the gradients of their tasks (exactly: a reduce-scatter within the group, of
    which only norms are kept; or from sketches). All ranks learn all norms from one small all-reduce, and every rank
    scales its gradients by c_t * R * (its part of the task's micro-steps). The engine then averages once over all R
    ranks.

    Args:
        adapter: of an engine of ZeRO stage 1 or 2 that keeps local gradients.
        weighting: turns the record of the step into factors.
        norm: "exact" or "sketch".
        size: length k of a sketch; None chooses by the number of parameters.
        groups: which ranks run which task.
        agreement: between all ranks.
    """

    def __init__(
        self,
        adapter: EngineAdapter,
        weighting: Weighting,
        norm: str,
        size: int | None,
        groups: TaskGroups,
        agreement: Agreement,
    ):
        super().__init__(adapter, weighting, size, groups.tasks)
        self.exact = norm == "exact"
        self.agreement = agreement
        self.rank = rank()
        self._own: dict[str, dict[int, Tensor]] = {}  # task of this rank -> index of the parameter -> gradient
        self._losses: dict[str, Tensor] = {}
        self._ran: tuple[str, ...] = ()
        self._parts: dict[str, float] = {}  # task of this rank -> this rank's part of its micro-steps
        self._process_groups: dict[tuple[int, ...], Any] = {}  # by ranks
        self.regroup(groups)

    def regroup(self, groups: TaskGroups) -> None:
        """Change which ranks run which task, between steps. Collective.

        Raises:
            ValueError: the groups are not the same on all ranks.
        """
        if not self.agreement.same([r in ranks for ranks in groups.ranks.values() for r in range(groups.world)]):
            raise ValueError("groups differ between ranks; derive them from nothing that differs between ranks")
        self.groups = groups
        for ranks in groups.members:  # every rank constructs all of them, in the same order
            if self.exact and 1 < len(ranks) < self.world and ranks not in self._process_groups:
                self._process_groups[ranks] = dist.new_group(list(ranks))

    @property
    def norm_error(self) -> float:
        return 0.0 if self.exact else super().norm_error

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.records) or tuple(self._own)

    @property
    def bytes(self) -> int:
        sketches = 0 if self.exact else held_bytes(self.sketcher.size) * len(self.groups.tasks)
        return super().bytes + self._kept_bytes(len(self.groups.of(self.rank)) - 1) + sketches

    def add(self, task: str, loss: Tensor) -> None:
        self._own[task] = {index: g for index, g in enumerate(self.local.remove_all()) if g is not None}
        self._losses[task] = loss

    def agree(self, micro_steps: Mapping[str, int]) -> tuple[str, ...]:
        every = self.agreement.rows([micro_steps.get(task, 0) for task in self.groups.tasks])
        self._ran, self._parts = (), {}
        ran = []
        for number, (task, ranks) in enumerate(self.groups.ranks.items()):
            counts = {rank: every[rank][number] for rank in ranks}
            if any(counts.values()):
                ran.append(task)
                absent = [rank for rank, count in counts.items() if not count]
                if absent:
                    raise BalancerError(
                        f"task '{task}' ran on rank(s) {_listed(set(ranks) - set(absent))} and not on "
                        f"{_listed(absent)}; it must run on ranks {_listed(ranks)}: loop over balancer.tasks on every "
                        "rank"
                    )
                if self.rank in ranks:
                    self._parts[task] = counts[self.rank] / sum(counts.values())
        self._ran = tuple(ran)
        return self._ran

    def finish(self) -> Combined:
        sketches = self._sketched() if self.watch or not (self.exact and self.weighting.streams) else None
        sums = torch.zeros(len(self._ran), 3, dtype=torch.float64, device=self.sketcher.device)
        count = len(self.shared)
        flags: list[bool] = []
        if self.exact and any(len(ranks) > 1 for ranks in self.groups.ranks.values()):
            flags = self.agreement.union([i in self._own.get(t, ()) for t in self._ran for i in range(count)])
        for number, (row, task) in enumerate(zip(sums, self._ran, strict=True)):
            if task in self._own:
                if self.exact:
                    row[0], row[1] = self._squares(task, flags[number * count : (number + 1) * count])
                row[2] = self._losses[task] * self._parts[task]
        all_reduce(sums)
        if not self.exact:
            assert sketches is not None
            sums[:, :2] = sketches.square().sum(2)
        for task, (square, other, loss) in zip(self._ran, sums, strict=True):
            self.records[task], self.usable[task] = self._record_of(task, square, square + other, loss)
        if sketches is not None:
            self._gram = self._with_measured_norms(self._gram_of(sketches[:, 0], summed=True))
        if self.weighting.streams:
            verdict = self._verdict({task: self.weighting.factors(self.records[task])[0] for task in self._ran})
        else:
            assert self._gram is not None
            verdict = self._joint_verdict(self._ran, self._gram)
        skipped, overflow = verdict.skipped, verdict.overflow
        used = [task for task in self._ran if task not in skipped]
        self.factors = {task: torch.zeros_like(self.records[task].losses[0]) for task in self._ran}
        if not overflow:
            used = [task for task in used if task in verdict.factors]
            skipped = tuple(task for task in self._ran if task not in used)
            self.factors |= {task: verdict.factors[task] for task in used}
        self.agreement.check("the sum of the tasks")  # a weighting may have raised on one rank
        self.local.begin()  # a rank whose tasks did not run has not begun
        self._set_local_gradients(used)
        return self._reduced(skipped, overflow, usable=bool(used))

    def _squares(self, task: str, has_gradient: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the squared norm of a task's gradient: on the backbone, and elsewhere.

        Args:
            task: of this rank.
            has_gradient: whether a parameter has a gradient of the task on any rank.
        """
        own = self._own[task]
        if len(self.groups.ranks[task]) == 1:
            flat = [(self.shared[index], gradient.reshape(-1)) for index, gradient in own.items()]
            shared, other = ([g for is_shared, g in flat if is_shared == kind] for kind in (True, False))
            return square_norm(shared, self.sketcher.device), square_norm(other, self.sketcher.device)
        group = self._process_groups.get(self.groups.ranks[task])  # None: all ranks

        def contribution(index: int) -> Tensor:
            if index in own:
                return own[index].reshape(-1).float() * self._parts[task]
            return torch.zeros(self.local.sizes[index], device=self.sketcher.device)

        used = [index for index, flag in enumerate(has_gradient) if flag]
        backbone, heads = ([index for index in used if self.shared[index] == kind] for kind in (True, False))
        return self._square_of_sum(map(contribution, backbone), group), self._square_of_sum(
            map(contribution, heads), group
        )

    def _square_of_sum(self, gradients: Iterable[Tensor], group: Any) -> Tensor:
        """Return the squared norm of this rank's part of the group's sum. Collective in the group, in buckets."""
        square = torch.zeros((), dtype=torch.float64, device=self.sketcher.device)
        count = dist.get_world_size(group)
        for bucket in _buckets(gradients):
            flat = torch.cat(bucket)
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % count))
            part = flat.new_empty(len(flat) // count)
            dist.reduce_scatter_tensor(part, flat, group=group)
            square += square_norm([part], self.sketcher.device)
        return square

    def _sketched(self) -> Tensor:
        """Return sketches of all tasks' gradients, equal on all ranks: (T, 2, k), of the backbone and elsewhere."""
        sketches = torch.zeros(len(self._ran), 2, self.sketcher.size, device=self.sketcher.device)
        for rows, task in zip(sketches, self._ran, strict=True):
            if task in self._own:
                torch.mul(self._sketch(self._own[task]), self._parts[task], out=rows)
        return all_reduce(sketches).double()

    def _with_measured_norms(self, gram: Tensor) -> Tensor:
        """Return a sketched Gram matrix (T, T) with its cosines kept and its diagonal set to the measured norms."""
        norms = torch.stack([self.records[task].norms[0] for task in self._ran]).to(gram)
        ratio = norms / gram.diagonal().clamp(min=1e-60).sqrt()
        return gram * ratio[:, None] * ratio[None, :]

    def _set_local_gradients(self, used: list[str]) -> None:
        """Give the engine this rank's scaled gradients, and zeros where only other ranks have one.

        All ranks must reduce the same parameters in the same order.
        """
        sums: dict[int, Tensor] = {}
        for task in used:
            if task in self._own:
                part = self.world * self._parts[task]
                self._add_scaled(sums, self._own.pop(task), self.factors[task], self.usable[task], part)
        has_gradient = self.agreement.union([index in sums for index in range(len(self.shared))])
        for index, (param, is_used) in enumerate(zip(self.local.params, has_gradient, strict=True)):
            if is_used:
                zeros = None if index in sums else torch.zeros_like(param, dtype=self.local.dtype)
                self.local.set(index, sums.pop(index) if zeros is None else zeros)

    def drop(self) -> None:
        self.local.remove_all()

    def clear(self) -> None:
        super().clear()
        self._own, self._losses, self._ran, self._parts = {}, {}, (), {}


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of 1-D tensors of about `BUCKET` elements together."""
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
