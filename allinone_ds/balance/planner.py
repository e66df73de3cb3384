"""How many ranks for which task: the division whose slowest rank is fastest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .groups import TaskGroups

MOST_TASKS = 8
"""Every way to put tasks together is tried: 4,140 of them for 8 tasks."""


@dataclass(frozen=True)
class GroupPlan:
    """A division of R ranks among T tasks, and the time it is expected to take.

    Args:
        groups: which ranks run which task.
        seconds: task -> seconds of one micro-batch.
        micro_steps: task -> micro-steps of one rank, where every rank runs every task.
    """

    groups: TaskGroups
    seconds: Mapping[str, float]
    micro_steps: Mapping[str, int]

    def busy(self, rank: int) -> float:
        """Seconds of a step in which a rank computes."""
        return sum(
            self.seconds[task] * len(self.groups.share(task, self.micro_steps[task], rank))
            for task in self.groups.of(rank)
        )

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, without what is sent: those of the busiest rank."""
        return max(self.busy(rank) for rank in range(self.groups.world))

    @property
    def sequential_seconds(self) -> float:
        """Seconds of the same step where every rank runs every task, without what is sent and waited for in it."""
        return sum(self.seconds[task] * self.micro_steps[task] for task in self.groups.tasks)

    @property
    def idle(self) -> float:
        """Part of all ranks' time in which they wait for the busiest, 0 to 1."""
        return self._idle(range(self.groups.world))

    def _idle(self, ranks: Sequence[int]) -> float:
        return max(0.0, 1 - sum(self.busy(rank) for rank in ranks) / (len(ranks) * self.step_seconds))

    def __str__(self) -> str:
        lines = [f"{'ranks':>9}  {'busy s':>8}  {'idle':>5}  tasks"]
        for ranks, tasks in self.groups.members.items():
            busy = max(self.busy(rank) for rank in ranks)
            batches = [self.micro_steps[task] * self.groups.world for task in tasks]
            said = ", ".join(
                f"{task} ({count} micro-batches of {self.seconds[task]:.3g} s)"
                for task, count in zip(tasks, batches, strict=True)
            )
            lines.append(f"{_span(ranks):>9}  {busy:8.3g}  {self._idle(ranks):5.0%}  {said}")
        lines.append(
            f"step {self.step_seconds:.3g} s, ranks idle {self.idle:.0%} of it; one task after another on all ranks: "
            f"{self.sequential_seconds:.3g} s (neither counts what is sent)"
        )
        return "\n".join(lines)


def plan_groups(seconds: Mapping[str, float], world: int, micro_steps: Mapping[str, int] | int = 1) -> GroupPlan:
    """The division of the ranks among the tasks whose busiest rank has least to do; of equals, the most groups.

    Tasks may be put together on the same ranks; with two tasks and ranks or more there are always two groups or more,
    since one group is what parallel="data" does. Exact: all ways to put tasks together are tried, and each hands out
    its ranks one by one to the group that is busiest.

    Args:
        seconds: task -> seconds of one micro-batch, forward and backward; `TaskBalancer.measure` gives them.
        world: number of ranks R.
        micro_steps: task -> micro-steps of one rank, if every rank ran every task (or one number for all): a step runs
            micro_steps * R micro-batches of the task.

    Raises:
        ValueError: no task, more than 8, a time or number that is not above 0.
    """
    tasks = tuple(seconds)
    if not 1 <= len(tasks) <= MOST_TASKS:
        raise ValueError(f"{len(tasks)} tasks; from 1 to {MOST_TASKS} can be planned: give `groups` yourself")
    steps = dict.fromkeys(tasks, micro_steps) if isinstance(micro_steps, int) else dict(micro_steps)
    for task in tasks:
        if not (seconds[task] > 0 and math.isfinite(seconds[task])) or steps.get(task, 0) < 1 or world < 1:
            raise ValueError(
                f"task '{task}': {seconds[task]!r} s, micro_steps {steps.get(task)!r}, {world} ranks; all must be "
                "above 0"
            )
    least = min(2, len(tasks), world)
    best: tuple[float, int, list[tuple[str, ...]], list[int]] | None = None
    for blocks in _partitions(tasks):
        if least <= len(blocks) <= world:
            sizes, slowest = _hand_out(blocks, seconds, steps, world)
            if best is None or (slowest, -len(blocks)) < best[:2]:
                best = slowest, -len(blocks), blocks, sizes
    assert best is not None
    ranks, first = {}, 0
    for block, size in zip(best[2], best[3], strict=True):
        ranks.update(dict.fromkeys(block, tuple(range(first, first + size))))
        first += size
    return GroupPlan(TaskGroups({task: ranks[task] for task in tasks}, world), dict(seconds), steps)


def _hand_out(
    blocks: list[tuple[str, ...]], seconds: Mapping[str, float], steps: Mapping[str, int], world: int
) -> tuple[list[int], float]:
    """Ranks of each block, and the seconds of the busiest rank."""

    def load(block: tuple[str, ...], size: int) -> float:
        return sum(-(-steps[task] * world // size) * seconds[task] for task in block)

    sizes = [1] * len(blocks)
    loads = [load(block, 1) for block in blocks]
    for _ in range(world - len(blocks)):
        busiest = max(range(len(blocks)), key=loads.__getitem__)
        sizes[busiest] += 1
        loads[busiest] = load(blocks[busiest], sizes[busiest])
    return sizes, max(loads)


def _partitions(tasks: tuple[str, ...]) -> Iterator[list[tuple[str, ...]]]:
    """Every way to put tasks together."""
    if not tasks:
        yield []
        return
    for blocks in _partitions(tasks[:-1]):
        yield [*blocks, tasks[-1:]]
        for number, block in enumerate(blocks):
            yield [*blocks[:number], (*block, tasks[-1]), *blocks[number + 1 :]]


def _span(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
