"""Which ranks run which task, and which micro-batches are a rank's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..strict import ConfigError, did_you_mean


@dataclass(frozen=True)
class TaskGroups:
    """The ranks of every task. Two tasks have the same ranks or none in common; a rank runs its tasks in this order.

    Args:
        ranks: task -> its ranks, ascending; the T tasks in the order they were given.
        world: number of ranks R.
    """

    ranks: Mapping[str, tuple[int, ...]]
    world: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """All T tasks."""
        return tuple(self.ranks)

    @property
    def members(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """The ranks of each group -> its tasks."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        for task, ranks in self.ranks.items():
            found[ranks] = (*found.get(ranks, ()), task)
        return found

    def of(self, rank: int) -> tuple[str, ...]:
        """The tasks that a rank runs."""
        return tuple(task for task, ranks in self.ranks.items() if rank in ranks)

    def share(self, task: str, micro_steps: int, rank: int) -> list[tuple[int, int]]:
        """The micro-batches of a task that a rank runs, so that all its ranks together run those of all R ranks.

        Where every rank runs every task, micro-step k of rank r is a micro-batch of its own: micro_steps * R of them.
        The ranks of a group deal them out like cards.

        Args:
            task: one of `tasks`.
            micro_steps: of one rank, where every rank runs every task.
            rank: 0..R-1.

        Returns:
            (micro-step, rank) of each, in the order they are to run; empty for a rank that does not run the task.
        """
        ranks = self.ranks[task]
        if rank not in ranks:
            return []
        mine = range(ranks.index(rank), micro_steps * self.world, len(ranks))
        return [divmod(number, self.world) for number in mine]


def everyone(tasks: Iterable[str], world: int) -> TaskGroups:
    """Every rank runs every task."""
    return TaskGroups({task: tuple(range(world)) for task in tasks}, world)


def task_groups(
    groups: Mapping[str, int | Sequence[int]] | TaskGroups | None, tasks: tuple[str, ...], world: int
) -> TaskGroups:
    """The groups that a user asks for.

    Args:
        groups: task -> how many ranks run it (consecutive ranks, in the order of `tasks`), or task -> its ranks; tasks
            with the same ranks run there one after another. None: ranks are dealt out evenly.
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


def groups_for(
    parallel: str, groups: Mapping[str, int | Sequence[int]] | TaskGroups | None, tasks: tuple[str, ...], world: int
) -> TaskGroups:
    """Which ranks run which task: those that `groups` says, or all with parallel="data".

    Raises:
        ConfigError: as of `task_groups`, and groups where every rank runs every task.
    """
    if parallel == "tasks":
        return task_groups(groups, tasks, world)
    if groups is not None:
        raise ConfigError(f"groups = {groups!r} with parallel = {parallel!r}; groups are for parallel='tasks'")
    return everyone(tasks, world)


def _evenly(tasks: tuple[str, ...], world: int) -> dict[str, int | Sequence[int]]:
    """As many ranks a task as go round, the first tasks one more; with more tasks than ranks, tasks share ranks."""
    if len(tasks) > world:
        return {task: (number % world,) for number, task in enumerate(tasks)}
    each, left = divmod(world, len(tasks))
    return {task: each + (number < left) for number, task in enumerate(tasks)}


def _consecutive(counts: Mapping[str, int], world: int) -> dict[str, tuple[int, ...]]:
    if sum(counts.values()) != world or min(counts.values()) < 1:
        found = ", ".join(f"{task} {count}" for task, count in counts.items())
        raise ConfigError(
            f"groups: {found}; the numbers must be from 1 on and add up to the {world} ranks of this job. Tasks that "
            "are to share ranks are given as lists of ranks, the same for each"
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
