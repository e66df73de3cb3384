"""The stall watch names the rank that the others wait for."""

from __future__ import annotations

import re

import pytest

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
