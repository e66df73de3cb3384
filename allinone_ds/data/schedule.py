"""Which samples a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of a micro-batch."""

    index: int
    """Place in the dataset, 0..N-1."""
    epoch: int
    """How often the task's dataset was run through before."""
    seed: int
    """Seed of this sample's augmentation, 63 bit."""
    position: int
    """Place in the task's endless order of samples."""


class Schedule:
    """The order of tasks and samples, computed from (seed, step) alone: nothing to save, nothing to restore.

    A task's samples form one endless order: its dataset permuted anew for every epoch, epoch after epoch.
    Sample b of micro-step k on rank r at step s stands in it at position p = ((s * K + k) * R + r) * B + b.
    So ranks see different samples, every sample comes once an epoch, and the order over all ranks does not
    depend on how many ranks share it as long as R * B stays the same.

    Args:
        seed: of the whole run.
        sizes: {task: number of samples N in its dataset}
        batch: {task: (batch size B per rank and micro-step, micro-steps K)}; its order is the order of tasks
            in a step
        world_size: number of ranks R.

    Raises:
        ValueError: the tasks differ, or a number is below 1.
    """

    def __init__(
        self, seed: int, sizes: Mapping[str, int], batch: Mapping[str, tuple[int, int]], world_size: int
    ) -> None:
        if set(sizes) != set(batch):
            raise ValueError(
                f"sizes are given for tasks {sorted(sizes)}, batch for {sorted(batch)}; give both for each"
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
        self._permutations: dict[tuple[str, int], np.ndarray] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, in the order they were given."""
        return tuple(self.batch)

    def order(self, step: int) -> tuple[str, ...]:
        """Tasks of a step, in the order they run; the same on every rank."""
        return self.tasks

    def draw(self, task: str, step: int, micro_step: int, rank: int) -> list[Draw]:
        """The B samples of one micro-batch.

        Args:
            task: one of `tasks`.
            step: optimizer step, from 0.
            micro_step: 0..K-1.
            rank: 0..R-1.

        Raises:
            ValueError: micro_step or rank is out of range.
        """
        batch_size, micro_steps = self.batch[task]
        if not 0 <= micro_step < micro_steps:
            raise ValueError(f"micro_step of task '{task}' is {micro_step}; it must lie in 0..{micro_steps - 1}")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank}; it must lie in 0..{self.world_size - 1}")
        first = ((step * micro_steps + micro_step) * self.world_size + rank) * batch_size
        return [self.at(task, position) for position in range(first, first + batch_size)]

    def at(self, task: str, position: int) -> Draw:
        """The sample at a position of the task's endless order."""
        epoch, place = divmod(position, self.sizes[task])
        index = int(self._permutation(task, epoch)[place])
        seed = int.from_bytes(_digest(self.seed, task, "augment", position)[:8], "little") >> 1
        return Draw(index, epoch, seed, position)

    def epoch(self, task: str, step: int) -> float:
        """Epochs of the task's dataset that all ranks together have run through before `step`."""
        batch_size, micro_steps = self.batch[task]
        return step * micro_steps * self.world_size * batch_size / self.sizes[task]

    def basis(self) -> dict[str, int]:
        """What the order of samples over all ranks depends on."""
        found = {"the seed": self.seed}
        for task, (batch_size, micro_steps) in self.batch.items():
            found[f"samples of '{task}'"] = self.sizes[task]
            found[f"images of '{task}' in a step"] = batch_size * micro_steps * self.world_size
        return found

    def _permutation(self, task: str, epoch: int) -> np.ndarray:
        """Order (N,) of one epoch; the two latest of a task are kept: a batch may straddle two epochs."""
        key = (task, epoch)
        if key not in self._permutations:
            for old in [k for k in self._permutations if k[0] == task and abs(k[1] - epoch) > 1]:
                del self._permutations[old]
            # RandomState: numpy keeps its numbers for ever, so a run can be resumed on another release.
            words = np.frombuffer(_digest(self.seed, task, "order", epoch), dtype="<u4")
            self._permutations[key] = np.random.RandomState(words).permutation(self.sizes[task])
        return self._permutations[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}

    def __repr__(self) -> str:
        values = f"seed={self.seed}, sizes={self.sizes}, batch={self.batch}, world_size={self.world_size}"
        return f"Schedule({values})"


def _digest(*parts: int | str) -> bytes:
    """32 bytes that depend on every part and on nothing else (`hash` would differ between processes)."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()
