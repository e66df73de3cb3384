"""The samples of every optimizer step: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allinone_ds.data.base import Part
from allinone_ds.data.loading.sampling import TaskSampling
from allinone_ds.data.loading.seeds import digest, random_state


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of a micro-batch.

    Example:
        >>> schedule = Schedule(0, sizes={"det": 10}, batch={"det": (2, 1)}, world_size=1)
        >>> [draw.position for draw in schedule.draw("det", step=3, micro_step=0, rank=0)]
        [6, 7]
    """

    index: int
    """Index in the dataset, 0..N-1."""
    epoch: int
    """Epochs of the task's dataset that ended before this sample."""
    seed: int
    """Seed of this sample's augmentation, 63 bit."""
    position: int
    """Position in the task's infinite sequence of samples."""


class Schedule:
    """The order of tasks and samples, computed from (seed, step) alone, so that a checkpoint does not need to hold it.

    The samples of a task form an infinite sequence: one permutation of its dataset per epoch. Sample b of micro-step k
    on rank r in the s-th step that runs the task has position p = ((s * K + k) * R + r) * B + b in this sequence.
    Therefore ranks see different samples, every sample occurs once per epoch, and the sequence over all ranks does not
    depend on the number of ranks as long as R * B is the same. After `continue_from` positions go on from those that
    it was given, whatever K, R and B were before.

    If the dataset has parts with weights, an epoch consists of the draws of all parts in a random order. The draws of
    one part are a sequence of their own, one permutation of its samples after the other.

    Args:
        seed: seed of the run.
        sizes: {task: number of samples N in its dataset}
        batch: {task: (batch size B per rank and micro-step, micro-steps K)}, in the order in which tasks run in a step
        world_size: number of ranks R.
        parts: {task: the parts of its dataset}; None draws every sample once per epoch.
        sampling: which tasks run in a step; None: all of them.

    Raises:
        ValueError: `sizes` and `batch` have different tasks, a number is below 1, or the parts do not add up.

    Example:
        >>> schedule = Schedule(0, sizes={"det": 10, "cls": 6}, batch={"det": (2, 1), "cls": (3, 2)}, world_size=2)
        >>> schedule.tasks
        ('det', 'cls')
        >>> draws = schedule.draw("cls", step=1, micro_step=0, rank=1)
        >>> [(draw.position, draw.epoch) for draw in draws]
        [(15, 2), (16, 2), (17, 2)]
        >>> schedule.epoch("cls", step=1)
        2.0
    """

    def __init__(
        self,
        seed: int,
        sizes: Mapping[str, int],
        batch: Mapping[str, tuple[int, int]],
        world_size: int,
        parts: Mapping[str, Sequence[Part]] | None = None,
        sampling: TaskSampling | None = None,
    ) -> None:
        if set(sizes) != set(batch):
            raise ValueError(
                f"sizes has tasks {sorted(sizes)}, batch has {sorted(batch)}; give both for the same tasks"
            )
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; it must be at least 1")
        for task, (batch_size, micro_steps) in batch.items():
            for field, value in (
                ("size", sizes[task]),
                ("batch_size", batch_size),
                ("micro_steps", micro_steps),
            ):
                if value < 1:
                    raise ValueError(f"{field} of task '{task}' is {value}; it must be at least 1")
        self.seed = seed
        self.sizes = dict(sizes)
        self.batch = dict(batch)
        self.world_size = world_size
        self.parts = {task: tuple((parts or {}).get(task, (Part(size, size),))) for task, size in sizes.items()}
        for task, of_task in self.parts.items():
            if sum(part.samples for part in of_task) != sizes[task]:
                raise ValueError(f"the parts of task '{task}' do not add up to its {sizes[task]} samples")
        self.sampling = sampling
        self._permutations: dict[tuple[str, int], np.ndarray] = {}
        self._origin = dict.fromkeys(batch, (0, 0))  # (steps that ran the task, position) where the sequence goes on
        self._orders = {task: task for task in batch}  # task -> the name that its permutations are drawn for

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order in which they run in a step, the same on every rank."""
        return tuple(self.batch)

    def tasks_of(self, step: int) -> tuple[str, ...]:
        """Return the tasks that run in a step, in their order, the same on every rank."""
        return self.tasks if self.sampling is None else self.sampling.tasks(step)

    def runs(self, task: str, step: int) -> int:
        """Return the number of steps before `step` that run a task."""
        return step if self.sampling is None else self.sampling.runs(task, step)

    def images(self, task: str) -> int:
        """Return the images of a task in a step that runs it, over all ranks."""
        batch_size, micro_steps = self.batch[task]
        return batch_size * micro_steps * self.world_size

    def position(self, task: str, step: int) -> int:
        """Return the position of the first sample of a task in `step` or later: those before it were drawn."""
        runs, position = self._origin[task]
        return position + (self.runs(task, step) - runs) * self.images(task)

    def state(self, step: int) -> dict[str, tuple[int, str]]:
        """Return where the sequence of each task goes on at `step`, for `continue_from`."""
        return {task: (self.position(task, step), self._orders[task]) for task in self.tasks}

    def continue_from(self, step: int, state: Mapping[str, tuple[int, str]]) -> None:
        """Go on at `step` with the sequences of an earlier run.

        Args:
            step: optimizer step.
            state: {task: what `state` returned}; the sequence of a task without an entry begins.
        """
        taken = {order for task, (_, order) in state.items() if task in self.batch}
        for task in self.tasks:
            new = task
            while new in taken:  # a task that has a different name now draws under this one
                new += "+"
            position, self._orders[task] = state.get(task, (0, new))
            self._origin[task] = (self.runs(task, step), position)
        self._permutations.clear()

    def draw(self, task: str, step: int, micro_step: int, rank: int) -> list[Draw]:
        """Return the B samples of one micro-batch.

        Args:
            task: one of `tasks`.
            step: optimizer step, from 0.
            micro_step: 0..K-1.
            rank: 0..R-1.

        Raises:
            ValueError: `micro_step` or `rank` is out of range.
        """
        batch_size, micro_steps = self.batch[task]
        if not 0 <= micro_step < micro_steps:
            raise ValueError(f"micro_step of task '{task}' is {micro_step}; it must lie in 0..{micro_steps - 1}")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank}; it must lie in 0..{self.world_size - 1}")
        first = self.position(task, step) + (micro_step * self.world_size + rank) * batch_size
        return [self.at(task, position) for position in range(first, first + batch_size)]

    def at(self, task: str, position: int) -> Draw:
        """Return the sample at a position of the task's sequence."""
        epoch, offset = divmod(position, self.epoch_size(task))
        index = int(self._permutation(self._orders[task], epoch, self.epoch_size(task))[offset])
        if len(self.parts[task]) > 1:
            index = self._in_part(task, epoch, index)
        seed = int.from_bytes(digest(self.seed, self._orders[task], "augment", position)[:8], "little") >> 1
        return Draw(index, epoch, seed, position)

    def epoch_size(self, task: str) -> int:
        """Return the number of draws in one epoch of a task: its samples, each as often as its weight says."""
        return sum(part.per_epoch for part in self.parts[task])

    def _in_part(self, task: str, epoch: int, draw: int) -> int:
        """Return the sample of one of the draws of an epoch, 0 to its size - 1, which are numbered part by part."""
        first = 0
        for number, part in enumerate(self.parts[task]):
            if draw < part.per_epoch:
                round_, offset = divmod(epoch * part.per_epoch + draw, part.samples)
                rounds = 2 * -(-part.per_epoch // part.samples)  # those of the two epochs that a batch may span
                order = f"{self._orders[task]}/{number}"
                return first + int(self._permutation(order, round_, part.samples, rounds)[offset])
            draw -= part.per_epoch
            first += part.samples
        raise IndexError(draw)

    def epoch(self, task: str, step: int) -> float:
        """Return the epochs of the task's dataset that all ranks together have consumed before `step`."""
        return self.position(task, step) / self.epoch_size(task)

    def basis(self) -> dict[str, int]:
        """Return the numbers that the sequence of samples over all ranks depends on, by their description."""
        numbers = {"the seed": self.seed}
        for task in self.tasks:
            numbers[f"samples of '{task}'"] = self.sizes[task]
            numbers[f"images of '{task}' in a step"] = self.images(task)
            for number, part in enumerate(self.parts[task]):
                if len(self.parts[task]) > 1:
                    numbers[f"samples of source {number + 1} of '{task}'"] = part.samples
                    numbers[f"samples of source {number + 1} of '{task}' per epoch"] = part.per_epoch
                if part.selection:
                    numbers[f"the split of '{task}'"] = part.selection
        return numbers

    def _permutation(self, order: str, epoch: int, size: int, kept: int = 1) -> np.ndarray:
        """Return the permutation (N,) of one epoch; neighbours stay in memory, since a batch may span two epochs."""
        key = (order, epoch)
        if key not in self._permutations:
            for old in [k for k in self._permutations if k[0] == order and abs(k[1] - epoch) > kept]:
                del self._permutations[old]
            drawn = random_state(self.seed, order, "order", epoch).permutation(size)
            self._permutations[key] = drawn.astype(np.min_scalar_type(size))  # each worker has its own
        return self._permutations[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}

    def __repr__(self) -> str:
        values = f"seed={self.seed}, sizes={self.sizes}, batch={self.batch}, world_size={self.world_size}"
        return f"Schedule({values})"
