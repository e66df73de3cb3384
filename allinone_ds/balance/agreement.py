"""Ranks compare what they are about to do, so that a disagreement or a failure of one of them is an error on all.

Every collective operation of a step follows an exchange of 32 bytes on the CPU. A rank with an error takes part in the
next exchange too, and says that it failed; ranks that wait for it then raise instead of waiting. Where a rank failed
inside a collective operation, or ended, the others find out through the store of the process group.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
import weakref
import zlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from allinone_ds.distributed import cpu_group, rank, world_size
from allinone_ds.errors import BalancerError

READY, FAILED, FAILED_INSIDE = range(3)
"""State of a rank in an exchange. `FAILED_INSIDE`: other ranks may be in a collective operation that it left."""
POLL = 1.0
"""Seconds between two looks of a waiting rank at whether another one has failed."""
GRACE = 15.0
"""Seconds that ranks wait for each other after an error, so that all of them can go on together."""
WARNING = 60.0
"""Seconds after which ranks that wait say for whom."""
WITHIN_STEP, BETWEEN_STEPS = 600.0, 1800.0
"""Seconds that a rank waits for the others: they may load, compile, evaluate or save."""
_ANSWER = 3.0
"""Seconds in which every rank that waits has answered what it waits for."""
_SETTLED = 4
"""Looks after which a collective operation does not complete any more, if all ranks wait or one has failed."""
_numbers = itertools.count()


class Agreement:
    """Small CPU messages between all ranks, which never wait for the accelerator. Construct it on every rank.

    Attributes:
        lost: why the ranks cannot be brought together again; None while they can.
    """

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()
        self.group: Any = cpu_group(apart="balancer")
        self.lost: str | None = None
        self._raised: weakref.ref[BalancerError] | None = None  # its traceback holds tensors
        self._doing = "the construction of the balancer"
        self._disagreed = ""  # the message of the last exchange, if it raised
        self._waits = 0  # the exchange that this rank has been waiting for, as the store has it
        self._count = 0  # exchanges so far, the same on all ranks
        self._store: Any = None
        if self.world > 1:
            self._store = dist.PrefixStore(f"balancer{next(_numbers)}", dist.distributed_c10d._get_default_store())

    def check(self, doing: str, within_step: bool = True) -> None:
        """Raise on every rank unless all ranks pass the same text. Collective.

        Args:
            doing: what this rank is about to do: text for the user, after "rank 0: ".
            within_step: whether the ranks were together in this step already, so that the wait can be shorter.

        Raises:
            BalancerError: names every rank and what it does, or the ranks that did not come.
        """
        if self.world == 1:
            return
        if self.lost is not None:
            raise self._known(self.lost)
        seconds = WITHIN_STEP if within_step else BETWEEN_STEPS
        self._exchange(doing, READY, GRACE if self._disagreed else seconds)

    def knows(self, error: BaseException) -> bool:
        """Return whether it is the last error that was raised here, so that the other ranks need not be told."""
        return self._raised is not None and self._raised() is error

    def fail(self, doing: str, inside: bool) -> str | None:
        """Take part in the next exchange as a rank that failed, and wait for the others for a short time.

        Args:
            doing: what this rank did, such as "left task 'det' with ValueError: ...".
            inside: whether other ranks may be in a collective operation that this rank has left.

        Returns:
            What the other ranks do; None when all of them failed in the same way.
        """
        if self.world == 1 or self.lost is not None:
            return self.lost
        try:
            self._publish(doing, "failed")
            self._exchange(doing, FAILED_INSIDE if inside else FAILED, GRACE)
        except RuntimeError as error:  # a BalancerError, or one of a store whose process has ended
            return str(error)
        return None

    def leave(self) -> None:
        """Let ranks that wait for this one know that it does not come any more, without waiting for them."""
        with contextlib.suppress(RuntimeError):  # the process with the store has ended
            self._publish("has left the loop (its balancer was detached or deleted)", "gone")

    def wait(self, work: Any) -> None:
        """Wait for a collective operation of the step, but not for ranks that have failed or ended.

        Args:
            work: an operation of a backend that waits on the CPU (gloo).

        Raises:
            BalancerError: names the rank that failed and what it did.
        """
        number, seen = self._count + 1, 0
        doing = f"in a collective operation after {self._doing}"
        while self._is_pending(work, number, doing):
            stuck = self._has(number, "failed", "gone", "lost") or not self._busy(number)
            seen = seen + 1 if stuck else 0
            if seen == _SETTLED:
                raise self._loss(number, doing)
        self._wait_for(0)

    def rows(self, numbers: list[int]) -> list[list[int]]:
        """Return every rank's numbers, by rank; each rank passes equally many. Collective."""
        own = torch.tensor(numbers, device="cpu")
        every = [torch.empty_like(own) for _ in range(self.world)]
        if self.world == 1:
            return [numbers]
        self._wait(dist.all_gather(every, own, group=self.group, async_op=True), WITHIN_STEP)
        return [row.tolist() for row in every]

    def same(self, flags: list[bool]) -> bool:
        """Return whether every rank passes the same flags. Collective."""
        return all(row == [int(flag) for flag in flags] for row in self.rows([int(flag) for flag in flags]))

    def union(self, flags: list[bool]) -> list[bool]:
        """Return the element-wise `or` of every rank's flags. Collective."""
        votes = torch.tensor(flags, dtype=torch.int32, device="cpu")
        if self.world > 1:
            self._wait(dist.all_reduce(votes, dist.ReduceOp.MAX, self.group, async_op=True), WITHIN_STEP)
        return [bool(vote) for vote in votes]

    def _exchange(self, doing: str, state: int, seconds: float) -> None:
        self._count += 1
        self._doing = doing
        code = 0 if state else zlib.crc32(doing.encode())
        extremes = torch.tensor([code, -code, state, -state], device="cpu")
        self._wait(dist.all_reduce(extremes, dist.ReduceOp.MAX, self.group, async_op=True), seconds)
        if extremes[0] == -extremes[1] and extremes[2] == -extremes[3]:
            self._disagreed = ""
            return
        texts = self._texts([code, state])
        if extremes[2] == READY:
            raise self._known(
                f"ranks disagree on what comes next ({texts}); every rank must run the same tasks with the same number "
                "of micro-steps in the same order: derive the order from (seed, step), not from a rank's own data"
            )
        if extremes[2] == FAILED:
            raise self._known(
                f"not every rank can go on ({texts}); what it ran is dropped on all ranks: run it again on all of "
                "them, or let the error end the run"
            )
        self.lost = _lost(texts)
        raise self._known(self.lost)

    def _wait(self, work: Any, seconds: float) -> None:
        """Wait for a message, but not for ranks that have left or ended, or do not come for so long."""
        number, start, warned = self._count, time.monotonic(), False
        while self._is_pending(work, number, f"waits at {self._doing}"):
            waited = time.monotonic() - start
            if self._has(number, "gone", "lost") or waited > seconds:
                raise self._loss(number, f"waits at {self._doing}")
            if waited > WARNING and not warned:
                warned = True
                self._warn(number)

    def _busy(self, number: int) -> list[int]:
        """Return the ranks that neither wait for others nor have failed."""
        return [r for r in range(self.world) if not (self._waits_for(number, r) or self._has(number, str(r)))]

    def _waits_for(self, number: int, r: int) -> bool:
        try:
            return self._store.check([f"waits{r}"]) and self._store.get(f"waits{r}") == str(number).encode()
        except RuntimeError:  # the process with the store has ended
            return True

    def _warn(self, number: int) -> None:
        """Let the first rank that waits warn of those that it waits for."""
        busy = self._busy(number)
        if busy and all(r in busy for r in range(self.rank)):
            warnings.warn(
                f"{_listed([self.rank])} has waited for {WARNING:.0f} s at {self._doing}; not there: {_listed(busy)}",
                stacklevel=2,
            )

    def _is_pending(self, work: Any, number: int, doing: str) -> bool:
        """Wait for a short time; return whether the work is not done."""
        try:
            work.wait(timedelta(seconds=POLL))
        except RuntimeError as error:
            if work.is_completed():  # a connection was closed
                raise self._loss(number, doing) from error
            self._wait_for(number)
            return True
        return False

    def _wait_for(self, number: int) -> None:
        """Publish that this rank waits before or in an exchange; 0: that it does not wait."""
        if number != self._waits:
            self._waits = number
            with contextlib.suppress(RuntimeError):  # the process with the store has ended
                self._store.set(f"waits{self.rank}", str(number))

    def _has(self, number: int, *events: str) -> bool:
        """Return whether one of the events has happened to a rank before or in an exchange."""
        try:
            return any(self._store.check([f"{number}/{event}"]) for event in events)
        except RuntimeError:  # the process with the store has ended
            return True

    def _publish(self, doing: str, event: str) -> None:
        if self.world > 1 and self.lost is None:
            self._store.set(f"{self._count + 1}/{self.rank}", doing)
            self._store.set(f"{self._count + 1}/{event}", "")

    def _known(self, message: str) -> BalancerError:
        error = BalancerError(message)
        self._disagreed, self._raised = message, weakref.ref(error)
        return error

    def _texts(self, own: list[int]) -> str:
        """Return what each rank does, after an exchange in which all of them took part. Collective."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(self.rows(own)):
            key = (number, *row) if row[1] else tuple(row)  # each failure has a text of its own
            alike.setdefault(key, []).append(number)
        self._store.set(f"{self._count}/{self.rank}", self._doing)
        answers = self._answers(self._count, [ranks[0] for ranks in alike.values()])
        return "; ".join(f"{_listed(ranks)}: {answers.get(ranks[0], _SILENT)}" for ranks in alike.values())

    def _loss(self, number: int, doing: str) -> BalancerError:
        """Return the error that names every rank that waits, with what it waits for, and the ones that do not answer.

        All other ranks that wait come here as well.
        """
        if self.lost is None:
            try:
                if not self._has(number, str(self.rank)):
                    self._store.set(f"{number}/{self.rank}", doing)
                self._store.set(f"{number}/lost", "")
                answers = self._answers(number, range(self.world))
            except RuntimeError:  # the process with the store has ended
                answers = {self.rank: doing}
            texts: dict[str, list[int]] = {}
            for r in range(self.world):
                texts.setdefault(answers.get(r, _SILENT), []).append(r)
            self.lost = _lost("; ".join(f"{_listed(ranks)}: {text}" for text, ranks in texts.items()))
            if self._disagreed:
                self.lost += f". Before that: {self._disagreed}"
        return self._known(self.lost)

    def _answers(self, number: int, ranks: Iterable[int]) -> dict[int, str]:
        """Return the text of each rank that has one soon."""
        end, missing, answers = time.monotonic() + _ANSWER, list(ranks), {}
        while missing and time.monotonic() < end:
            for r in list(missing):
                if self._store.check([f"{number}/{r}"]):
                    answers[r] = self._store.get(f"{number}/{r}").decode()
                    missing.remove(r)
            if missing:
                time.sleep(0.02)
        return answers


_SILENT = "no answer (ended, or busy outside of the balancer)"


def _lost(texts: str) -> str:
    return f"the ranks cannot be brought together again ({texts}); start all processes again, from a checkpoint"


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
