"""Ranks tell each other what they are about to do, so that a disagreement is an error and not a hang."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .errors import BalancerError


class Agreement:
    """A small exchange between all ranks over the CPU: it never waits for the accelerator.

    Collective to make: every rank of the default process group must.

    Args:
        names: what can be agreed on; the same on all ranks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.world = dist.get_world_size()
        gloo = dist.get_backend() == "gloo"
        self.group: Any = None if gloo or self.world == 1 else dist.new_group(backend="gloo")

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
        if self.world > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(v) for v in votes]

    def _say(self, code: int, number: int) -> str:
        name = self.names[code]
        return f"task '{name}', {number} micro-steps" if number >= 0 else name
