"""Notices when a rank stands still, and says which one and where, instead of waiting in a collective for ever."""

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


class StallWatch:
    """Every rank publishes how far it is; all of them look at all, each in threads of its own.

    Ranks go through the same sequence of `mark` calls. When a rank's count has not moved for `timeout` seconds, the
    ranks with the lowest count are those that the others wait for. The marks travel through the store that the ranks
    met at, on connections of their own, once every `interval` seconds; nothing is added to a step but a counter.

    Args:
        timeout: seconds without a mark after which a rank stands still.
        end: called with the message on the ranks that still run; the default prints it (lowest rank only) and ends the
            process at once, since its main thread may be inside a collective that never returns.
    """

    def __init__(self, timeout: float, end: Callable[[str], None] | None = None) -> None:
        self.timeout = timeout
        self.interval = min(5.0, max(0.2, timeout / 10))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._end = end or self._say_and_exit
        self._place: tuple[int, str] = (0, "the start of training")
        self._seen: dict[int, list[Any]] = {}  # rank -> [count, where, time its count moved, beat, time it beat]
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._speaks = True
        # a connection of its own: a call that waits would hold up everybody who uses the same one
        self._store = dist.PrefixStore("stall_watch", dist.distributed_c10d._get_default_store().clone())
        self._store.set_timeout(timedelta(seconds=max(timeout, 60.0)))
        self._beats = 0
        self._publish()
        dist.barrier()
        self._threads = [threading.Thread(target=call, daemon=True) for call in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def mark(self, where: str) -> None:
        """This rank has come to `where`; every rank makes the same calls."""
        self._place = (self._place[0] + 1, where)

    def close(self) -> None:
        """Look no longer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self.interval)

    def _key(self, rank: int) -> str:
        return f"rank{rank}"

    def _publish(self) -> None:
        self._beats += 1
        self._store.set(self._key(self.rank), json.dumps([*self._place, self._beats]))

    def _exchange(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._publish()
                texts = self._store.multi_get([self._key(rank) for rank in range(self.world)])
            except Exception:  # the store's own rank is gone or stands still: `_judge` sees that nothing is answered
                continue
            now = time.monotonic()
            for rank, text in enumerate(texts):
                count, where, beat = json.loads(text)
                seen = self._seen.setdefault(rank, [count, where, now, beat, now])
                if count != seen[0]:
                    seen[:3] = [count, where, now]
                if beat != seen[3]:
                    seen[3:] = [beat, now]
            self._answered = now

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self._forgive(now - before - self.interval, now)
            before = now
            message = self._verdict(now)
            if message:
                self._stop.set()
                self._end(message)
                return

    def _forgive(self, held: float, now: float) -> None:
        """Take off the seconds in which this process did not run itself: a scheduler may suspend a whole job."""
        if held > self.interval:
            self._answered = min(now, self._answered + held)
            for seen in list(self._seen.values()):
                seen[2], seen[4] = min(now, seen[2] + held), min(now, seen[4] + held)

    def _verdict(self, now: float) -> str:
        limit = f"for {self.timeout:g} s (trainer.stall_timeout)"
        if now - self._answered > self.timeout:
            where = self._seen[0][1] if 0 in self._seen else "unknown"
            self._speaks = self.rank == min(1, self.world - 1)
            return (
                f"rank 0, which keeps the ranks' meeting point, has not answered {limit}: its process is stopped, or "
                f"its host is down or cut off. It was last seen at {where}; rank {self.rank} is at {self._place[1]}"
            )
        silence = min(self.timeout, 6 * self.interval)
        if now - self._answered > silence:  # what is known of the ranks is old, of this one too: it may be rank 0
            return ""
        still = [rank for rank, seen in self._seen.items() if now - seen[2] > self.timeout]
        if not still:
            return ""
        lowest = min(seen[0] for seen in self._seen.values())
        last = [rank for rank, seen in self._seen.items() if seen[0] == lowest]
        quiet = {rank: now - self._seen[rank][4] for rank in last}
        silent = [rank for rank in last if quiet[rank] > silence]
        if not silent and max(quiet.values()) > 2.5 * self.interval:  # it may have just stopped: that shows soon
            return ""
        late = [rank for rank in last if rank in still]
        if not silent and not late:  # only ranks that are ahead stand still, and wait for one that still moves
            return ""
        live = [rank for rank in self._seen if rank not in silent]
        self._speaks = self.rank == min(live, default=self.rank)
        named = silent or late
        if len(late) == self.world and not silent:
            return (
                f"no rank has moved {limit}: all of them are at {self._seen[0][1]}. Something that all of them use "
                "does not answer: the network between them, the accelerators, or the file system"
            )
        why = (
            "does not answer at all: its process is stopped, or its host is down or cut off"
            if silent
            else "is alive but does not come on: look at its data source, file system and accelerator"
        )
        who = ", ".join(str(rank) for rank in named)
        ahead = max(self._seen.values(), key=lambda seen: seen[0])
        return (
            f"rank {who} has not moved {limit} and {why}. It is at {self._seen[named[0]][1]}; the furthest rank is at "
            f"{ahead[1]}"
        )

    def _say_and_exit(self, message: str) -> None:
        if self._speaks:
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks with the first one: let it speak
        os._exit(1)
