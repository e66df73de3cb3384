"""Which ranks run which task, which micro-batches a rank runs, and the planner of the fastest assignment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean


@dataclass(frozen=True)
class TaskGroups:
    """The ranks of every task. Two tasks have the same ranks or none in common; a rank runs its tasks in this order.

    Args:
        ranks: task -> its ranks, ascending; the T tasks in the order they were given.
        world: number of ranks R.

    Example:
        >>> groups = TaskGroups({"det": (0, 1), "cls": (2,)}, world=3)
        >>> groups.of(2)
        ('cls',)
        >>> groups.share("det", micro_steps=1, rank=0)
        [(0, 0), (0, 2)]
    """

    ranks: Mapping[str, tuple[int, ...]]
    world: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """All T tasks."""
        return tuple(self.ranks)

    @property
    def members(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """The ranks of each group -> the tasks of the group."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        for task, ranks in self.ranks.items():
            found[ranks] = (*found.get(ranks, ()), task)
        return found

    def of(self, rank: int) -> tuple[str, ...]:
        """Return the tasks that a rank runs."""
        return tuple(task for task, ranks in self.ranks.items() if rank in ranks)

    def share(self, task: str, micro_steps: int, rank: int) -> list[tuple[int, int]]:
        """Return the micro-batches of a task that a rank runs; its ranks together run those of all R ranks.

        Where every rank runs every task, micro-step k of rank r is one micro-batch, so there are micro_steps * R of
        them. The ranks of a group take them in turns.

        Args:
            task: one of `tasks`.
            micro_steps: of one rank, where every rank runs every task.
            rank: 0..R-1.

        Returns:
            (micro-step, rank) of each, in the order in which they run; empty for a rank that does not run the task.
        """
        ranks = self.ranks[task]
        if rank not in ranks:
            return []
        mine = range(ranks.index(rank), micro_steps * self.world, len(ranks))
        return [divmod(number, self.world) for number in mine]


def task_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the tasks.

    Raises:
        ValueError: no name, a name twice, or a name that is not a non-empty string.
    """
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"tasks = {names!r}; pass at least one name, each once, each a non-empty string")
    return names


def everyone(tasks: Iterable[str], world: int) -> TaskGroups:
    """Return groups in which every rank runs every task."""
    return TaskGroups({task: tuple(range(world)) for task in tasks}, world)


def task_groups(
    groups: Mapping[str, int | Sequence[int]] | TaskGroups | None, tasks: tuple[str, ...], world: int
) -> TaskGroups:
    """Return the groups that a user asks for.

    Args:
        groups: task -> how many ranks run it (consecutive ranks, in the order of `tasks`), or task -> its ranks; tasks
            with the same ranks run there one after another. None: ranks are divided evenly.
        tasks: names of the T tasks.
        world: number of ranks R.

    Raises:
        ConfigError: says which task or rank is wrong, and what is allowed.
    """
    if isinstance(groups, TaskGroups):
        groups = dict(groups.ranks)
    if groups is None:
        groups = _evenly(tasks, world)
    for task in groups:
        if task not in tasks:
            raise ConfigError(f"groups: unknown task '{task}'; {did_you_mean(str(task), tasks)}")
    absent = [task for task in tasks if task not in groups]
    if absent:
        raise ConfigError(f"groups: no ranks for task(s) {', '.join(absent)}; give every task its ranks")
    if all(isinstance(count, int) for count in groups.values()):
        return TaskGroups(_consecutive({task: groups[task] for task in tasks}, world), world)  # type: ignore[misc]
    ranks = {task: _ranks_of(task, groups[task], world) for task in tasks}
    _check_partition(ranks, world)
    return TaskGroups(ranks, world)


def check_groups(groups: Mapping[str, int | Sequence[int]], tasks: tuple[str, ...]) -> None:
    """Raise for groups that fit no job at all, before the number of ranks is known.

    Args:
        groups: as of `task_groups`.
        tasks: names of the T tasks.

    Raises:
        ConfigError: says which task or rank is wrong, and what is allowed.
    """
    counts = [value for value in groups.values() if isinstance(value, int)]
    ranks = [rank for value in groups.values() if not isinstance(value, int | str) for rank in value]
    task_groups(groups, tasks, max([sum(counts), *(rank + 1 for rank in ranks if isinstance(rank, int))]))


def groups_for(
    parallel: str, groups: Mapping[str, int | Sequence[int]] | TaskGroups | None, tasks: tuple[str, ...], world: int
) -> TaskGroups:
    """Return which ranks run which task: those that `groups` names, or all with parallel="data".

    Raises:
        ConfigError: as of `task_groups`, and groups where every rank runs every task.
    """
    if parallel == "tasks":
        return task_groups(groups, tasks, world)
    if groups is not None:
        raise ConfigError(f"groups = {groups!r} with parallel = {parallel!r}; groups are for parallel='tasks'")
    return everyone(tasks, world)


def _evenly(tasks: tuple[str, ...], world: int) -> dict[str, int | Sequence[int]]:
    """Divide ranks evenly, the first tasks get one more; with more tasks than ranks, tasks have ranks in common."""
    if len(tasks) > world:
        return {task: (number % world,) for number, task in enumerate(tasks)}
    each, left = divmod(world, len(tasks))
    return {task: each + (number < left) for number, task in enumerate(tasks)}


def _consecutive(counts: Mapping[str, int], world: int) -> dict[str, tuple[int, ...]]:
    if sum(counts.values()) != world or min(counts.values()) < 1:
        found = ", ".join(f"{task} {count}" for task, count in counts.items())
        raise ConfigError(
            f"groups: {found}; the numbers must be 1 or more and add up to the {world} ranks of this job. Give "
            "tasks that run on the same ranks as lists of ranks, the same list for each"
        )
    ranks, first = {}, 0
    for task, count in counts.items():
        ranks[task] = tuple(range(first, first + count))
        first += count
    return ranks


def _ranks_of(task: str, ranks: int | Sequence[int], world: int) -> tuple[int, ...]:
    listed = [] if isinstance(ranks, (int, str)) else list(ranks)
    good = all(isinstance(rank, int) and 0 <= rank < world for rank in listed)
    if not listed or not good or len(set(listed)) != len(listed):
        raise ConfigError(
            f"groups: task '{task}' has {ranks!r}; give a list of its ranks, each once, from 0 to {world - 1} (or "
            "the number of ranks of every task)"
        )
    return tuple(sorted(listed))


def _check_partition(ranks: Mapping[str, tuple[int, ...]], world: int) -> None:
    owners: dict[int, str] = {}
    for task, group in ranks.items():
        for rank in group:
            other = owners.setdefault(rank, task)
            if ranks[other] != group:
                raise ConfigError(
                    f"groups: rank {rank} runs '{other}' on ranks {list(ranks[other])} and '{task}' on "
                    f"{list(group)}; two tasks have the same ranks or none in common"
                )
    idle = [rank for rank in range(world) if rank not in owners]
    if idle:
        raise ConfigError(f"groups: rank(s) {', '.join(map(str, idle))} run no task; every rank of the job must")


MOST_TASKS = 8
"""Every partition of the tasks is tried: 4,140 of them for 8 tasks."""


@dataclass(frozen=True)
class GroupPlan:
    """An assignment of R ranks to T tasks, and the time that a step is expected to take.

    Args:
        groups: which ranks run which task.
        seconds: task -> seconds of one micro-batch.
        micro_steps: task -> micro-steps of one rank, where every rank runs every task.

    Example:
        >>> plan = plan_groups({"det": 3.0, "cls": 1.0}, world=4)
        >>> plan.step_seconds, plan.sequential_seconds
        (6.0, 4.0)
    """

    groups: TaskGroups
    seconds: Mapping[str, float]
    micro_steps: Mapping[str, int]

    def busy(self, rank: int) -> float:
        """Return the seconds of a step in which a rank computes."""
        return sum(
            self.seconds[task] * len(self.groups.share(task, self.micro_steps[task], rank))
            for task in self.groups.of(rank)
        )

    @property
    def step_seconds(self) -> float:
        """Seconds of a step without communication: those of the busiest rank."""
        return max(self.busy(rank) for rank in range(self.groups.world))

    @property
    def sequential_seconds(self) -> float:
        """Seconds of the same step where every rank runs every task, without communication."""
        return sum(self.seconds[task] * self.micro_steps[task] for task in self.groups.tasks)

    @property
    def idle(self) -> float:
        """Fraction of all ranks' time in which they wait for the busiest, 0 to 1."""
        return self._idle(range(self.groups.world))

    def _idle(self, ranks: Sequence[int]) -> float:
        return max(0.0, 1 - sum(self.busy(rank) for rank in ranks) / (len(ranks) * self.step_seconds))

    def __str__(self) -> str:
        lines = [f"{'ranks':>9}  {'busy s':>8}  {'idle':>5}  tasks"]
        for ranks, tasks in self.groups.members.items():
            busy = max(self.busy(rank) for rank in ranks)
            batches = [self.micro_steps[task] * self.groups.world for task in tasks]
            texts = ", ".join(
                f"{task} ({count} micro-batches of {self.seconds[task]:.3g} s)"
                for task, count in zip(tasks, batches, strict=True)
            )
            lines.append(f"{_span(ranks):>9}  {busy:8.3g}  {self._idle(ranks):5.0%}  {texts}")
        lines.append(
            f"step {self.step_seconds:.3g} s, ranks idle {self.idle:.0%} of it; one task after another on all ranks: "
            f"{self.sequential_seconds:.3g} s (both without communication)"
        )
        return "\n".join(lines)


def plan_groups(seconds: Mapping[str, float], world: int, micro_steps: Mapping[str, int] | int = 1) -> GroupPlan:
    """Return the assignment of ranks to tasks with the shortest step.

    The step is as long as its busiest rank computes. Among equally short steps the one with the most groups is taken.
    Tasks may run on the same ranks. With two or more tasks and ranks there are always at least two groups, since one
    group is what parallel="data" does. The search is exact: it tries all partitions of the tasks, and assigns the ranks
    of each one by one to the busiest group.

    Args:
        seconds: task -> seconds of one micro-batch, forward and backward; `TaskBalancer.measure` gives them.
        world: number of ranks R.
        micro_steps: task -> micro-steps of one rank, if every rank ran every task (or one number for all): a step runs
            micro_steps * R micro-batches of the task.

    Raises:
        ValueError: no task, more than 8, a time or number that is not above 0.

    Example:
        >>> from allinone_ds import plan_groups
        >>> plan = plan_groups({"det": 3.0, "cls": 1.0}, world=4)
        >>> plan.groups.ranks
        {'det': (0, 1, 2), 'cls': (3,)}
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
            sizes, slowest = _assign_ranks(blocks, seconds, steps, world)
            if best is None or (slowest, -len(blocks)) < best[:2]:
                best = slowest, -len(blocks), blocks, sizes
    assert best is not None
    ranks, first = {}, 0
    for block, size in zip(best[2], best[3], strict=True):
        ranks.update(dict.fromkeys(block, tuple(range(first, first + size))))
        first += size
    return GroupPlan(TaskGroups({task: ranks[task] for task in tasks}, world), dict(seconds), steps)


def _assign_ranks(
    blocks: list[tuple[str, ...]], seconds: Mapping[str, float], steps: Mapping[str, int], world: int
) -> tuple[list[int], float]:
    """Return the number of ranks of each block, and the seconds of the busiest rank."""

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
    """Yield every partition of the tasks."""
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
