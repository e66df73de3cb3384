"""Ranks tell each other what they are about to do, so that a disagreement is an error and not a hang."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from allinone_ds.distributed import all_reduce, cpu_group, world_size
from allinone_ds.errors import BalancerError


class Agreement:
    """A small exchange between all ranks over the CPU: it never waits for the accelerator.

    Collective to make: every rank of the default process group must.

    Args:
        names: what can be agreed on; the same on all ranks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.world = world_size()
        self.group: Any = cpu_group()

    def check(self, name: str, number: int) -> None:
        """Raise on every rank unless all ranks came with the same name and number.

        Args:
            name: one of `names`: the task this rank enters, or the step.
            number: micro-steps of the task.

        Raises:
            BalancerError: names every rank and what it came with.
        """
        if self.world == 1:
            return
        code = self.names.index(name)
        extremes = torch.tensor([code, -code, number, -number])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if extremes[0] == -extremes[1] and extremes[2] == -extremes[3]:
            return
        mine = torch.tensor([code, number])
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self.group)
        found = "; ".join(f"rank {r}: {self._say(int(e[0]), int(e[1]))}" for r, e in enumerate(every))
        raise BalancerError(
            f"ranks disagree on what comes next ({found}); every rank must run the same tasks with the same number of "
            "micro-steps in the same order: derive the order from (seed, step), not from a rank's own data"
        )

    def rows(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, by rank; each brings equally many."""
        mine = torch.tensor(numbers)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self.group)
        return [row.tolist() for row in every]

    def same(self, flags: list[bool]) -> bool:
        """Whether every rank came with the same flags."""
        return all(row == [int(flag) for flag in flags] for row in self.rows([int(flag) for flag in flags]))

    def union(self, flags: list[bool]) -> list[bool]:
        """Element-wise `or` of every rank's flags."""
        votes = torch.tensor(flags, dtype=torch.int32)
        return [bool(v) for v in all_reduce(votes, dist.ReduceOp.MAX, self.group)]

    def _say(self, code: int, number: int) -> str:
        name = self.names[code]
        return f"task '{name}', {number} micro-steps" if number >= 0 else name
