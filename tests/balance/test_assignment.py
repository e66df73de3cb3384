"""Which ranks run which task, which micro-batches belong to a rank, and the plan, compared with every division."""

from __future__ import annotations

import itertools

import pytest

from allinone_ds.balance.assignment import TaskGroups, plan_groups, task_groups

TASKS = ("det", "seg", "cls")


@pytest.mark.parametrize(
    ("groups", "world", "ranks"),
    [
        ({"det": 2, "seg": 1, "cls": 1}, 4, [(0, 1), (2,), (3,)]),
        ({"cls": 1, "seg": 1, "det": 2}, 4, [(0, 1), (2,), (3,)]),  # the order is that of the tasks
        ({"det": [3, 0], "seg": (1, 2), "cls": (2, 1)}, 4, [(0, 3), (1, 2), (1, 2)]),
        (None, 5, [(0, 1), (2, 3), (4,)]),
        (None, 2, [(0,), (1,), (0,)]),
        (None, 1, [(0,), (0,), (0,)]),
    ],
)
def test_groups_list_the_ranks_of_every_task(groups, world: int, ranks: list[tuple[int, ...]]) -> None:
    found = task_groups(groups, TASKS, world)
    assert list(found.ranks.items()) == list(zip(TASKS, ranks, strict=True))
    assert task_groups(found, TASKS, world) == found
    assert all(rank in found.ranks[task] for rank in range(world) for task in found.of(rank))


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({"det": 2, "seg": 1, "cls": 2}, "add up to the 4 ranks"),
        ({"det": 3, "seg": 1, "cls": 0}, "1 or more"),
        ({"det": 2, "seg": 1}, "no ranks for task"),
        ({"det": 2, "seg": 1, "cls": 1, "clss": 1}, "did you mean 'cls'"),
        ({"det": (0, 1), "seg": (1, 2), "cls": (3,)}, "rank 1 runs 'det'"),
        ({"det": (0, 1), "seg": (2,), "cls": (2,)}, "3 run no task"),
        ({"det": (0, 1), "seg": (2, 2), "cls": (3,)}, "each once, from 0 to 3"),
        ({"det": (0, 1), "seg": (2,), "cls": (4,)}, "each once, from 0 to 3"),
        ({"det": (0, 1), "seg": (2,), "cls": ()}, "give a list of its ranks"),
        ({"det": (0, 1), "seg": 1, "cls": (3,)}, "give a list of its ranks"),
    ],
)
def test_invalid_groups_are_refused(groups, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        task_groups(groups, TASKS, 4)


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (0,), (1, 2, 3), (0, 3)])
@pytest.mark.parametrize("micro_steps", [1, 2, 3])
def test_shares_are_the_micro_batches_of_all_ranks_each_once(ranks: tuple[int, ...], micro_steps: int) -> None:
    groups = TaskGroups({"det": ranks}, 4)
    shares = [groups.share("det", micro_steps, rank) for rank in range(4)]
    assert sorted(sum(shares, [])) == list(itertools.product(range(micro_steps), range(4)))
    sizes = [len(share) for rank, share in enumerate(shares) if rank in ranks]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    if len(ranks) == 4:
        assert shares == [[(k, rank) for k in range(micro_steps)] for rank in range(4)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seconds", [(4.0, 2.0, 1.0), (10.0, 1.0, 1.0), (1.0, 1.1, 0.9), (0.3, 7.0, 2.0)])
def test_no_division_has_a_faster_slowest_rank(world: int, seconds: tuple[float, ...]) -> None:
    times, steps = dict(zip(TASKS, seconds, strict=True)), {"det": 1, "seg": 2, "cls": 1}
    plan = plan_groups(times, world, steps)
    fastest = float("inf")
    for homes in itertools.product(range(3), repeat=3):  # every task to a group, every rank to a group
        if len(set(homes)) < min(2, world):
            continue
        for of_rank in itertools.product(sorted(set(homes)), repeat=world):
            if set(of_rank) == set(homes):
                load = dict.fromkeys(homes, 0.0)
                for task, home in zip(TASKS, homes, strict=True):
                    load[home] += -(-steps[task] * world // of_rank.count(home)) * times[task]
                fastest = min(fastest, max(load.values()))
    assert plan.step_seconds == pytest.approx(fastest)
    busy = [plan.busy(rank) for rank in range(world)]
    assert max(busy) == plan.step_seconds and plan.idle == pytest.approx(1 - sum(busy) / world / max(busy))
    assert sum(busy) == pytest.approx(plan.sequential_seconds * world), "the same micro-batches in both modes"


def test_a_plan_reports_the_choice_and_the_idle_time() -> None:
    plan = plan_groups({"det": 4.0, "seg": 2.0, "cls": 1.0}, 4)
    assert plan.groups.ranks == {"det": (0, 1), "seg": (2,), "cls": (3,)}
    assert (plan.step_seconds, plan.sequential_seconds, plan.idle) == (8.0, 7.0, 0.125)
    for text in ("0,1", "det (4 micro-batches of 4 s)", "50%", "step 8 s, ranks idle 12% of it", "7 s"):
        assert text in str(plan)


@pytest.mark.parametrize(
    ("seconds", "world", "text"),
    [({}, 4, "0 tasks"), (dict.fromkeys("abcdefghi", 1.0), 9, "9 tasks"), ({"det": 0.0}, 4, "'det': 0.0 s")],
)
def test_invalid_times_are_refused(seconds: dict, world: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_groups(seconds, world)
