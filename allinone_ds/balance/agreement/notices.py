"""What ranks write for each other in the store of the process group, which can be read while they wait for each other.

The process of rank 0 has the store. Once it has ended nothing can be read; that counts as the end of every rank.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from allinone_ds.distributed import rank, world_size

ANSWER = 3.0
"""Seconds in which every rank that waits has written what it waits for."""
UNKNOWN = "?"
"""Where a rank waits, if the store has ended."""
_numbers = itertools.count()


class RankNotices:
    """The notices of one balancer, by the number of the message that they belong to. Construct it on every rank."""

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()
        self._own_place = ""
        self._store: Any = None
        if self.world > 1:
            self._store = dist.PrefixStore(f"balancer{next(_numbers)}", dist.distributed_c10d._get_default_store())

    def wait_at(self, place: str) -> None:
        """Write where this rank waits; empty: that it does not."""
        if place != self._own_place:
            self._own_place = place
            with contextlib.suppress(RuntimeError):  # the store has ended
                self._store.set(f"waits{self.rank}", place)

    def place_of(self, r: int) -> str:
        """Return where a rank waits, as it gave it to `wait_at`."""
        try:
            return self._store.get(f"waits{r}").decode() if self._store.check([f"waits{r}"]) else ""
        except RuntimeError:  # the store has ended
            return UNKNOWN

    def tell(self, number: int, text: str, event: str = "") -> None:
        """Write what this rank does, and that an event has happened.

        Args:
            number: of the message.
            text: for the user; a text that this rank has written already stays.
            event: of any rank; empty: none.

        Raises:
            RuntimeError: the store has ended.
        """
        if self._store is not None:
            if not self.has_text(number, self.rank):
                self._store.set(f"{number}/{self.rank}", text)
            if event:
                self._store.set(f"{number}/{event}", "")

    def happened(self, number: int, *events: str) -> bool:
        """Return whether one of the events has happened; True if the store has ended."""
        try:
            return any(self._store.check([f"{number}/{event}"]) for event in events)
        except RuntimeError:
            return True

    def has_text(self, number: int, r: int) -> bool:
        """Return whether a rank has written what it does; True if the store has ended."""
        return self.happened(number, str(r))

    def texts(self, number: int, ranks: Iterable[int]) -> dict[int, str]:
        """Return the text of each of some ranks, of those that write one soon.

        Raises:
            RuntimeError: the store has ended.
        """
        end, missing, found = time.monotonic() + ANSWER, list(ranks), {}
        while missing and time.monotonic() < end:
            for r in list(missing):
                if self._store.check([f"{number}/{r}"]):
                    found[r] = self._store.get(f"{number}/{r}").decode()
                    missing.remove(r)
            if missing:
                time.sleep(0.02)
        return found
