"""Ranks compare what they are about to do, so that a disagreement or a failure of one of them is an error on all.

Points: a step is a sequence of them: the beginning of a task, each collective backward, the end of a task, the
optimizer step (`Agreement.reach`).

Messages: an all-reduce on the CPU with a code of what a rank is about to do, and its state. Ranks count messages alike.
A message is sent (`_send`), and later waited for and compared (`_settle`).

Plan: in the first step, and in one that goes otherwise than the one before, each point is a message that ranks wait
for. In all others the first point is the only message: the points of the last step, agreed to be those of this one. It
is waited for before the first collective operation, and each rank compares its later points with the plan by itself.

A rank that leaves the plan, or has an error, sends a message. Others that wait in a collective operation do not answer
it. So it writes a notice first (`RankNotices`), and every rank that waits looks for notices each second (`_looks`):

- All ranks have come to the message: each raises the same `BalancerError`, and they can go on together.
- A rank has left a collective operation, has ended, or does not come in time: each rank that waits writes where it
  waits and raises. The ranks are `lost` to each other, and every later point raises that error too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.balance.agreement.notices import UNKNOWN, RankNotices
from allinone_ds.balance.agreement.parts import PlannedParts
from allinone_ds.distributed import cpu_group, rank, world_size
from allinone_ds.errors import BalancerError

READY, FAILED, FAILED_INSIDE = range(3)
"""State of a rank in a message. `FAILED_INSIDE`: other ranks may be in a collective operation that it left."""
POLL = 1.0
"""Seconds between two looks of a waiting rank at whether another one has failed."""
GRACE = 15.0
"""Seconds that ranks wait for each other after an error, so that all of them can go on together."""
WARNING = 60.0
"""Seconds after which ranks that wait say for whom."""
WITHIN_STEP, BETWEEN_STEPS = 600.0, 1800.0
"""Seconds that a rank waits for the others: they may load, compile, evaluate or save."""
_SETTLED, _APART, _STUCK = 4, 15, 120
"""Looks after which a collective operation does not complete any more: if a rank has failed; if all ranks wait, some of
them for a message; if all of them wait in an operation, which a slow network may explain."""


@dataclass
class _Message:
    """A message that this rank has sent.

    Args:
        doing: what this rank does, for the user.
        code, state: what is compared.
        extremes: code, -code, state, -state and the carried numbers, each the largest of all ranks.
        work: of the all-reduce.
        seconds: to wait for the other ranks.
    """

    doing: str
    code: int
    state: int
    extremes: Tensor
    work: Any
    seconds: float


class Agreement:
    """Small CPU messages between all ranks, which never wait for the accelerator. Construct it on every rank.

    Attributes:
        lost: why the ranks cannot be brought together again; None while they can.
        carry: returns numbers that messages carry, equally many on every rank.
        carried: the largest of each of these numbers over all ranks, in the last message.

    Example::

        agreement = Agreement()
        for task in tasks:
            agreement.reach(f"task '{task}'")  # raises on every rank, if one is in a different task
            ...
        agreement.end_step()
    """

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()
        self.group: Any = cpu_group(apart="balancer")
        self.lost: str | None = None
        self._raised: weakref.ref[BalancerError] | None = None  # its traceback holds tensors
        self._doing = "the construction of the balancer"
        self._last_error = ""  # if the last message raised one
        self._count = 0  # messages so far, the same on all ranks
        self._notices = RankNotices()
        self.carry: Callable[[], Sequence[int]] = tuple
        self.carried: tuple[int, ...] | None = None
        self._plan: list[str] = []  # points of the last step; empty: each point is a message
        self._points: list[str] = []  # of this step, so far
        self._follows = False  # whether they are those of the plan
        self._parts = PlannedParts()
        self._sent: _Message | None = None  # not waited for yet

    def check(self, doing: str, within_step: bool = True) -> None:
        """Raise on every rank unless all ranks pass the same text. Collective.

        Args:
            doing: what this rank is about to do: text for the user, after "rank 0: ".
            within_step: whether the ranks were together in this step already, so that the wait can be shorter.

        Raises:
            BalancerError: names every rank and what it does, or the ranks that did not come.
        """
        if self.world > 1:
            self._settle()
            self._send(doing, READY, self._patience(within_step))
            self._settle()

    def reach(self, doing: str, communicates: bool = True) -> None:
        """Pass a point of a step, and raise unless all ranks pass it. Collective in a step without a plan.

        Args:
            doing: as in `check`; what the rank is about to do.
            communicates: whether a collective operation follows before the next point.

        Raises:
            BalancerError: as `check`.
        """
        if self.world == 1:
            return
        first, place = not self._points, len(self._points)
        self._points.append(doing)
        if not first:
            self._settle()
        if first:
            self._follows = self._plan[:1] == [doing]
            self._send(doing, READY, self._patience(within_step=False), self._plan if self._follows else [doing])
        elif not self._follows or self._plan[place : place + 1] != [doing]:
            self._follows = False
            self._send(doing, READY, self._patience(within_step=True))
        if communicates or not self._follows:
            self._settle()

    def end_step(self, complete: bool = True) -> None:
        """Begin a new step: the next one is planned as this one, if this one is complete.

        Args:
            complete: False after an error, and where the step was given up.
        """
        if self._points:
            self._parts.learn(self._points if complete else None)
            self._plan, self._points = self._points if complete else [], []
            self._follows = False

    def plan(self, openings: Sequence[str]) -> None:
        """Plan the next step from parts that ran in earlier steps, instead of as the step before. Alike on every rank.

        Args:
            openings: as in `PlannedParts.plan`.
        """
        self._plan = self._parts.plan(openings)

    def knows(self, error: BaseException) -> bool:
        """Return whether it is the last error that was raised here, so that the other ranks need not be told."""
        return self._raised is not None and self._raised() is error

    def fail(self, doing: str, inside: bool) -> str | None:
        """Take part in the next message as a rank that failed, and wait for the others for a short time.

        Args:
            doing: what this rank did, such as "left task 'det' with ValueError: ...".
            inside: whether other ranks may be in a collective operation that this rank has left.

        Returns:
            What the other ranks do; None when all of them failed in the same way.
        """
        if self.world == 1 or self.lost is not None:
            return self.lost
        try:
            if self._sent is not None:
                self._sent.seconds = GRACE
            self._settle()
            self._notices.tell(self._count + 1, doing, "failed")
            self._send(doing, FAILED_INSIDE if inside else FAILED, GRACE)
            self._settle()
        except RuntimeError as error:  # a BalancerError, or the store has ended
            return str(error)
        return None

    def leave(self) -> None:
        """Let ranks that wait for this one know that it does not come any more, without waiting for them."""
        if self.lost is None:
            with contextlib.suppress(RuntimeError):  # the store has ended
                text = "has left the loop (its balancer was detached or deleted)"
                self._notices.tell(self._count + 1, text, "gone")

    def wait(self, work: Any) -> None:
        """Wait for a collective operation of the step, but not for ranks that have failed or ended.

        Args:
            work: an operation of a backend that waits on the CPU (gloo), or what a GPU has been given.

        Raises:
            BalancerError: names the rank that failed and what it did.
        """
        late = 0
        for _ in self._looks(work, inside=True):
            number = self._count + 1
            patience = _SETTLED if self._notices.happened(number, "failed", "gone", "lost") else math.inf
            if not self._busy(number):
                apart = any(self._notices.place_of(r) == str(number) for r in range(self.world))
                patience = min(patience, max(_APART if apart else _STUCK, getattr(work, "looks", 0)))
            late = late + 1 if patience < math.inf else 0
            if late >= patience:
                raise self._loss(inside=True)
        self._notices.wait_at("")

    def rows(self, numbers: list[int]) -> list[list[int]]:
        """Return every rank's numbers, by rank; each rank passes equally many. Collective."""
        if self.world == 1:
            return [numbers]
        self._settle()
        return self._gathered(numbers)

    def same(self, flags: list[bool]) -> bool:
        """Return whether every rank passes the same flags. Collective."""
        return all(row == [int(flag) for flag in flags] for row in self.rows([int(flag) for flag in flags]))

    def union(self, flags: list[bool]) -> list[bool]:
        """Return the element-wise `or` of every rank's flags. Collective."""
        votes = torch.tensor(flags, dtype=torch.int32, device="cpu")
        if self.world > 1:
            self._settle()
            self._complete(partial(dist.all_reduce, votes, dist.ReduceOp.MAX))
        return votes.bool().tolist()

    def _gathered(self, numbers: list[int]) -> list[list[int]]:
        own = torch.tensor(numbers, device="cpu")
        every = [torch.empty_like(own) for _ in range(self.world)]
        self._complete(partial(dist.all_gather, every, own))
        return [row.tolist() for row in every]

    def _complete(self, start: Callable[..., Any]) -> None:
        self._count += 1
        self._wait(start(group=self.group, async_op=True), WITHIN_STEP, "failed", "gone", "lost")

    def _patience(self, within_step: bool) -> float:
        if self.lost is not None:
            raise self._known(self.lost)
        return GRACE if self._last_error else WITHIN_STEP if within_step else BETWEEN_STEPS

    def _send(self, doing: str, state: int, seconds: float, plan: Sequence[str] = ()) -> None:
        """Send what this rank does, without waiting for the others.

        Args:
            doing: for the user.
            state: of this rank.
            seconds: that `_settle` waits.
            plan: points that are compared, in place of `doing`.
        """
        self._count += 1
        self._doing = doing if len(plan) < 2 else f"{doing}, then as in the last step"
        code = 0 if state else zlib.crc32("\n".join(plan or [doing]).encode())
        extremes = torch.tensor([code, -code, state, -state, *self.carry()], device="cpu")
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, self.group, async_op=True)
        self._sent = _Message(self._doing, code, state, extremes, work, seconds)

    def _settle(self) -> None:
        """Wait for the message that this rank has sent, if there is one, and raise unless all ranks agree."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        self._wait(sent.work, sent.seconds, "gone", "lost")
        low, high, state, other, *carried = sent.extremes.tolist()
        if low == -high and state == -other:
            self._last_error, self.carried = "", tuple(carried)
            if sent.state:
                self.end_step(complete=False)
            return
        self.end_step(complete=False)
        texts = self._texts([sent.code, sent.state])
        if state == READY:
            raise self._known(
                f"ranks disagree on what comes next ({texts}); every rank must run the same tasks, micro-steps, layers "
                "and heads in the same order: derive the order from (seed, step), not from a rank's own data"
            )
        if state == FAILED:
            raise self._known(
                f"not every rank can go on ({texts}); what it ran is dropped on all ranks: run it again on all of "
                "them, or let the error end the run"
            )
        self.lost = _lost(texts)
        raise self._known(self.lost)

    def _wait(self, work: Any, seconds: float, *events: str) -> None:
        """Wait for a message, but not after one of the events, nor for ranks that do not come for so long."""
        for look in self._looks(work, inside=False):
            waited = look * POLL  # not by a clock, so that a suspended job can go on
            if self._notices.happened(self._count, *events) or waited > seconds:
                raise self._loss(inside=False)
            if waited - POLL <= WARNING < waited:
                self._warn()

    def _looks(self, work: Any, inside: bool) -> Iterator[int]:
        """Yield 1, 2, ... every `POLL` seconds while work is not done, and tell the others where this rank waits.

        Args:
            work: a message, or a collective operation of the step (`inside`).
        """
        for look in itertools.count(1):
            try:
                work.wait(timedelta(seconds=POLL))
                return
            except RuntimeError as error:
                if work.is_completed():  # a connection was closed
                    raise self._loss(inside) from error
            self._notices.wait_at(f"{self._count + 1} inside" if inside else str(self._count))
            yield look

    def _busy(self, number: int) -> list[int]:
        """Return the ranks that neither wait for others, before or after a message, nor have failed."""
        places = (str(number), f"{number} inside", UNKNOWN)
        told, place_of = self._notices.has_text, self._notices.place_of
        return [r for r in range(self.world) if place_of(r) not in places and not told(number, r)]

    def _warn(self) -> None:
        """Let the first rank that waits warn of those that it waits for."""
        busy = self._busy(self._count)
        if busy and all(r in busy for r in range(self.rank)):
            warnings.warn(
                f"{_listed([self.rank])} has waited for {WARNING:.0f} s at {self._doing}; not there: {_listed(busy)}",
                stacklevel=2,
            )

    def _known(self, message: str) -> BalancerError:
        error = BalancerError(message)
        self._last_error, self._raised = message, weakref.ref(error)
        return error

    def _texts(self, own: list[int]) -> str:
        """Return what each rank does, after a message in which all of them took part. Collective."""
        alike: dict[tuple[int, ...], list[int]] = {}
        number = self._count
        for r, row in enumerate(self._gathered(own)):
            key = (r, *row) if row[1] else tuple(row)  # each failure has a text of its own
            alike.setdefault(key, []).append(r)
        self._notices.tell(number, self._doing)
        answers = self._notices.texts(number, [ranks[0] for ranks in alike.values()])
        return "; ".join(f"{_listed(ranks)}: {answers.get(ranks[0], _SILENT)}" for ranks in alike.values())

    def _loss(self, inside: bool) -> BalancerError:
        """Return the error that names every rank that waits, with what it waits for, and the ones that do not answer.

        All other ranks that wait come here as well.

        Args:
            inside: whether this rank waits in a collective operation, and not for a message.
        """
        number, doing = self._count, f"waits at {self._doing}"
        if inside:
            number, doing = number + 1, f"in a collective operation after {(self._points or [self._doing])[-1]}"
        self.end_step(complete=False)
        if self.lost is None:
            try:
                self._notices.tell(number, doing, "lost")
                answers = self._notices.texts(number, range(self.world))
            except RuntimeError:  # the store has ended
                answers = {self.rank: doing}
            texts: dict[str, list[int]] = {}
            for r in range(self.world):
                texts.setdefault(answers.get(r, _SILENT), []).append(r)
            self.lost = _lost("; ".join(f"{_listed(ranks)}: {text}" for text, ranks in texts.items()))
            if self._last_error:
                self.lost += f". Before that: {self._last_error}"
        return self._known(self.lost)


_SILENT = "no answer (ended, or busy outside of the balancer)"


def _lost(texts: str) -> str:
    return f"the ranks cannot be brought together again ({texts}); start all processes again, from a checkpoint"


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
