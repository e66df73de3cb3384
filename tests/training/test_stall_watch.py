"""The stall watch names the rank that the others wait for."""

from __future__ import annotations

import json
import re

import pytest

from allinone_ds.training.watch import stall_watch
from allinone_ds.training.watch.stall_watch import StallWatch


def watch(rank: int, seen: dict[int, list], answered: float = 100.0) -> StallWatch:
    made = object.__new__(StallWatch)
    made.rank, made.world, made.timeout, made.interval = rank, len(seen), 10.0, 1.0
    made._seen, made._answered, made._place = seen, answered, (9, "here")
    return made


@pytest.mark.parametrize(
    ("seen", "answered", "words"),
    [  # rank -> count, where, when it moved, beat, when it beat; now is 100
        ({0: [5, "a", 95, 1, 99], 1: [4, "b", 94, 1, 99]}, 99, None),
        ({0: [5, "a", 80, 1, 99], 1: [4, "b", 95, 1, 99]}, 99, None),  # 0 waits for 1, which moves
        ({0: [5, "a", 85, 1, 99], 1: [4, "b", 80, 1, 80]}, 99, "rank 1 .*does not answer.* at b.* at a"),
        ({0: [5, "a", 85, 1, 99], 1: [4, "b", 80, 1, 99]}, 99, "rank 1 .*is alive"),
        (  # a host with ranks 2 and 3 is lost: 3 is behind
            {0: [6, "a", 85, 1, 99], 1: [6, "a", 85, 1, 99], 2: [5, "b", 84, 1, 85], 3: [4, "c", 83, 1, 85]},
            99,
            "rank 2, 3 .*does not answer.* Rank 3 is at c.* at a",
        ),
        ({0: [5, "a", 85, 1, 99], 1: [5, "a", 80, 1, 99]}, 99, "no rank has made progress.* at a"),
        ({0: [5, "a", 89, 1, 99], 1: [5, "a", 91, 1, 95]}, 99, None),  # 1 has just stopped, or is a little late
        ({0: [5, "a", 88, 1, 99], 1: [5, "a", 91, 1, 93]}, 99, "rank 1 .*does not answer"),
        ({0: [6, "a", 88, 1, 91], 1: [5, "b", 88, 1, 91]}, 91, None),  # rank 0 keeps silent, 1 had been behind it
        ({0: [6, "a", 88, 1, 89], 1: [5, "b", 88, 1, 89]}, 89, "rank 0, which hosts"),
        ({0: [5, "a", 85, 1, 85], 1: [5, "a", 85, 1, 85]}, 85, "rank 0, which hosts.* at a; rank 1 is at here"),
    ],
)
def test_the_rank_that_others_wait_for_is_named(seen: dict, answered: float, words: str | None) -> None:
    found = watch(1, seen, answered)._stall_message(100.0)
    assert (not found) if words is None else re.search(words, found), found


def test_one_rank_reads_all_counts_and_the_others_its_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it publishes nothing new: then each rank reads what the others say themselves."""
    world, now = 8, [0.0]
    store = {f"rank{r}": json.dumps([r, "a task", 1]) for r in range(world)}
    read: list[str] = []

    class Store:
        def get(self, key):
            read.append(key)
            return store[key].encode()

        def multi_get(self, keys):
            return [self.get(key) for key in keys]

        def set(self, key, value):
            store[key] = value

    def rows(rank: int) -> list:
        read.clear()
        return ranks[rank]._read()

    monkeypatch.setattr(stall_watch.time, "monotonic", lambda: now[0])
    ranks = {rank: watch(rank, dict.fromkeys(range(world), [])) for rank in (0, 1)}
    for made in ranks.values():
        made._store, made._summary, made._summarized = Store(), "", 0.0
    assert [count for count, *_ in rows(0)] == list(range(world)) and len(read) == world
    assert rows(1) == ranks[0]._read() and "all" in read
    now[0] = 2.0
    assert rows(1) and read == ["all"]
    store["rank7"] = json.dumps([70, "a task", 2])
    now[0] = 3.0  # rank 0 has published nothing for 2.5 intervals
    assert rows(1)[7] == [70, "a task", 2] and len(read) == world + 1
