"""Ranks compare what they are about to do, so that a disagreement is an error and not a hang."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from allinone_ds.distributed import all_reduce, cpu_group, world_size
from allinone_ds.errors import BalancerError


class Agreement:
    """Small CPU messages between all ranks, which never wait for the accelerator. Construct it on every rank.

    Args:
        names: what ranks can agree on; the same on all ranks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.world = world_size()
        self.group: Any = cpu_group()

    def check(self, name: str, number: int) -> None:
        """Raise on every rank unless all ranks pass the same name and number. Collective.

        Args:
            name: one of `names`: the task that this rank enters, or the step.
            number: micro-steps of the task.

        Raises:
            BalancerError: names every rank and what it passed.
        """
        if self.world == 1:
            return
        code = self.names.index(name)
        extremes = torch.tensor([code, -code, number, -number])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if extremes[0] == -extremes[1] and extremes[2] == -extremes[3]:
            return
        passed = "; ".join(f"rank {r}: {self._text(*row)}" for r, row in enumerate(self.rows([code, number])))
        raise BalancerError(
            f"ranks disagree on what comes next ({passed}); every rank must run the same tasks with the same number of "
            "micro-steps in the same order: derive the order from (seed, step), not from a rank's own data"
        )

    def rows(self, numbers: list[int]) -> list[list[int]]:
        """Return every rank's numbers, by rank; each rank passes equally many. Collective."""
        own = torch.tensor(numbers)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self.group)
        return [row.tolist() for row in every]

    def same(self, flags: list[bool]) -> bool:
        """Return whether every rank passes the same flags. Collective."""
        return all(row == [int(flag) for flag in flags] for row in self.rows([int(flag) for flag in flags]))

    def union(self, flags: list[bool]) -> list[bool]:
        """Return the element-wise `or` of every rank's flags. Collective."""
        votes = torch.tensor(flags, dtype=torch.int32)
        return [bool(vote) for vote in all_reduce(votes, dist.ReduceOp.MAX, self.group)]

    def _text(self, code: int, number: int) -> str:
        name = self.names[code]
        return f"task '{name}', {number} micro-steps" if number >= 0 else name
