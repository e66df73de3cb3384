"""The seeded schedule of faults: fault number N is the same in every start of the command."""

from __future__ import annotations

import random
from dataclasses import dataclass

SURVIVED = {
    "rank suspended": "SIGSTOP to one rank, SIGCONT after 5 to 40 s",
    "job suspended": "SIGSTOP to every process of the run, SIGCONT after 5 to 40 s",
    "slow disk": "the file system of the run's folder frozen for 5 to 40 s",
    "network cut": "the link between the hosts down for 5 to 60 s, twice per round",
}
"""Fault -> how it is injected, for those after which the run goes on without a new start."""
ENDED = {
    "rank killed": "SIGKILL to one rank",
    "all ranks killed": "SIGKILL to all ranks",
    "host preempted": "SIGTERM to the launcher of one host",
    "job preempted": "SIGTERM to the launchers of both hosts",
    "disk full": "a file takes all space of the file system of the run's folder",
    "data gone": "the data folder renamed until the run has ended",
    "host lost": "one host disconnected, then all of its processes killed",
}
"""Fault -> how it is injected, for those that end the run, which is then started again."""


@dataclass(frozen=True)
class Fault:
    """One fault of the schedule.

    Attributes:
        number: place in the schedule, from 0.
        kind: a key of `SURVIVED` or `ENDED`.
        gap: seconds of undisturbed training before it.
        seconds: how long it lasts, for the kinds of `SURVIVED`.
        rank: the rank that it hits; of its hosts the one with the same parity.
    """

    number: int
    kind: str
    gap: float
    seconds: float
    rank: int


def fault(seed: int, number: int, gap: float) -> Fault:
    """Return a fault of the schedule.

    A round has every kind. Those that the run survives come first, in random order, so that each round has a long time
    without a new start, in which growth can be seen; those that end it follow.

    Args:
        seed: of the schedule.
        number: place of the fault, from 0.
        gap: mean seconds of undisturbed training before a fault.

    Example:
        >>> fault(0, 3, 60.0) == fault(0, 3, 60.0)
        True
    """
    survived, ended = [*SURVIVED, "network cut"], list(ENDED)
    done, place = divmod(number, len(survived) + len(ended))
    order = random.Random(f"{seed} round {done}")
    order.shuffle(survived)
    order.shuffle(ended)
    kind, drawn = [*survived, *ended][place], random.Random(f"{seed} fault {number}")
    longest = 60.0 if kind == "network cut" else 40.0
    wait, lasts = drawn.uniform(0.5 * gap, 1.5 * gap), drawn.uniform(5.0, longest)
    return Fault(number, kind, round(wait, 1), round(lasts, 1), drawn.randrange(4))
