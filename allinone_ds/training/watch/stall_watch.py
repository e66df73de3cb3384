"""Detect a rank that makes no progress, and name it, instead of waiting in a collective until its timeout."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from allinone_ds.distributed import barrier, rank, world_size
from allinone_ds.training.ranks.failures import record_failure

_SUMMARY = "all"
"""Key of what rank 0 has read of all ranks."""


class StallWatch:
    """Ends the run with an error that names the rank that the others wait for.

    Every rank makes the same sequence of `mark` calls and publishes how many it has made. If the count of a rank has
    not changed for `timeout` seconds, the ranks with the lowest count are the ones that the others wait for. Two
    threads per rank exchange and compare the counts every few seconds, through a separate connection to the store of
    the default process group: rank 0 reads all counts and publishes them as one value, which the others read. A
    training step only increments a counter.

    Construct it on every rank after the default process group was initialized:

        watch = StallWatch(timeout=900)
        for step, batch in enumerate(loader):
            watch.mark(f"step {step}")
            ...
        watch.close()

    Args:
        timeout: seconds without a mark after which a rank counts as stalled.
        end: called with the message on every rank that still runs. The default prints the message on the lowest such
            rank and ends the process at once, because its main thread may be in a collective that never returns.
    """

    def __init__(self, timeout: float, end: Callable[[str], None] | None = None) -> None:
        self.timeout = timeout
        self.interval = min(5.0, max(0.2, timeout / 10))
        self.rank, self.world = rank(), world_size()
        self._end = end or self._print_and_exit
        self._place: tuple[int, str] = (0, "the start of training")
        # rank -> [count, place, time at which the count changed, heartbeat, time at which the heartbeat changed]
        self._seen: dict[int, list[Any]] = {}
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._prints = True
        # a separate connection: a blocking call would block every other user of the same connection
        self._store = dist.PrefixStore("stall_watch", dist.distributed_c10d._get_default_store().clone())
        self._store.set_timeout(timedelta(seconds=max(timeout, 60.0)))
        self._heartbeat = 0
        self._summary = ""  # as read last, and when it changed
        self._summarized = time.monotonic()
        self._publish()
        if self.rank == 0:
            self._store.set(_SUMMARY, json.dumps([[*self._place, 0]] * self.world))
        barrier()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._exchange, self._check)]
        for thread in self._threads:
            thread.start()

    def mark(self, where: str) -> None:
        """Report that this rank has reached a point of the run. Every rank makes the same sequence of calls.

        Args:
            where: name of the point, for the message.
        """
        self._place = (self._place[0] + 1, where)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self.interval)

    def _key(self, number: int) -> str:
        return f"rank{number}"

    def _publish(self) -> None:
        self._heartbeat += 1
        self._store.set(self._key(self.rank), json.dumps([*self._place, self._heartbeat]))

    def _read(self) -> list[list[Any]]:
        """Return [count, place, heartbeat] of every rank; from each rank itself if rank 0 publishes nothing new."""
        now = time.monotonic()
        if self.rank:
            text = self._store.get(_SUMMARY).decode()
            if text != self._summary:
                self._summary, self._summarized = text, now
            if now - self._summarized < 2.5 * self.interval:
                return json.loads(text)
        texts = self._store.multi_get([self._key(number) for number in range(self.world)])
        rows = [json.loads(text) for text in texts]
        if self.rank == 0:
            self._store.set(_SUMMARY, json.dumps(rows))
        return rows

    def _exchange(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._publish()
                rows = self._read()
            except Exception:  # the rank that hosts the store is gone or stalled: `_check` sees the missing answers
                continue
            now = time.monotonic()
            for number, (count, place, heartbeat) in enumerate(rows):
                seen = self._seen.setdefault(number, [count, place, now, heartbeat, now])
                if count != seen[0]:
                    seen[:3] = [count, place, now]
                if heartbeat != seen[3]:
                    seen[3:] = [heartbeat, now]
            self._answered = now

    def _check(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self._discount_suspension(now - before - self.interval, now)
            before = now
            message = self._stall_message(now)
            if message:
                self._stop.set()
                self._end(message)
                return

    def _discount_suspension(self, suspended: float, now: float) -> None:
        """Ignore the seconds in which this process did not run: a scheduler may suspend a whole job."""
        if suspended > self.interval:
            self._answered = min(now, self._answered + suspended)
            for seen in list(self._seen.values()):
                seen[2], seen[4] = min(now, seen[2] + suspended), min(now, seen[4] + suspended)

    def _stall_message(self, now: float) -> str:
        """Return the error message; empty if no rank is stalled or it is too early to say which."""
        limit = f"for {self.timeout:g} s (trainer.stall_timeout)"
        if now - self._answered > self.timeout:
            place = self._seen[0][1] if 0 in self._seen else "an unknown place"
            self._prints = self.rank == min(1, self.world - 1)
            return (
                f"rank 0, which hosts the store of the ranks, has not answered {limit}: its process is stopped, or its "
                f"host is down or disconnected. Its last known place is at {place}; rank {self.rank} is at "
                f"{self._place[1]}"
            )
        silence = min(self.timeout, 6 * self.interval)
        if now - self._answered > silence:  # all counts are old, those of this rank too: rank 0 may be the cause
            return ""
        stalled = [number for number, seen in self._seen.items() if now - seen[2] > self.timeout]
        if not stalled:
            return ""
        lowest = min(seen[0] for seen in self._seen.values())
        last = [number for number, seen in self._seen.items() if seen[0] == lowest]
        quiet = {number: now - self._seen[number][4] for number in last}
        silent = [number for number in last if quiet[number] > silence]
        if not silent and max(quiet.values()) > 2.5 * self.interval:  # its process may just have stopped: wait
            return ""
        late = [number for number in last if number in stalled]
        if not silent and not late:  # only ranks that are ahead are stalled: they wait for a rank that progresses
            return ""
        live = [number for number in self._seen if number not in silent]
        self._prints = self.rank == min(live, default=self.rank)
        named = late
        if silent:  # of a host that is lost, also the ranks that had come further
            named = [number for number, seen in self._seen.items() if number in silent or now - seen[4] > silence]
        if len(late) == self.world and not silent:
            return (
                f"no rank has made progress {limit}: all of them are at {self._seen[0][1]}. Something that all of "
                "them use does not respond: the network between them, the accelerators, or the file system"
            )
        cause = (
            "does not answer: its process is stopped, or its host is down or disconnected"
            if silent
            else "is alive: check its data source, file system and accelerator"
        )
        who = ", ".join(str(number) for number in named)
        behind = (silent or late)[0]
        where = "It is" if len(named) == 1 else f"Rank {behind} is"
        first = max(self._seen.values(), key=lambda seen: seen[0])
        return (
            f"rank {who} has not made progress {limit} and {cause}. {where} at {self._seen[behind][1]}; the furthest "
            f"rank is at {first[1]}"
        )

    def _print_and_exit(self, message: str) -> None:
        if self._prints:
            record_failure(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks when the first one exits: let that one print
        os._exit(1)
