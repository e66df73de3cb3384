"""The schedule: every sample once per epoch, the same on every number of ranks, and reproducible for ever."""

import pickle
from collections import Counter
from itertools import product

import pytest

from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.data.loading.seeds import random_state

SHAPES = [  # N samples, batch size B, K micro-steps, R ranks
    (12, 2, 1, 1),
    (12, 2, 3, 2),
    (13, 2, 2, 3),  # no number divides another
    (3, 4, 1, 2),  # a batch larger than the dataset
    (1, 1, 1, 1),
]


def make(n: int, b: int, k: int, r: int, seed: int = 0) -> Schedule:
    return Schedule(seed, {"det": n, "cls": 5}, {"det": (b, k), "cls": (1, 1)}, world_size=r)


def flat(schedule: Schedule, task: str, steps: range) -> list:
    """Return the draws of all ranks in the order of the steps."""
    k, r = schedule.batch[task][1], schedule.world_size
    return [d for s, i, rank in product(steps, range(k), range(r)) for d in schedule.draw(task, s, i, rank)]


@pytest.mark.parametrize(("n", "b", "k", "r"), SHAPES)
def test_every_sample_occurs_once_per_epoch_over_ranks_and_steps(n, b, k, r):
    draws = flat(make(n, b, k, r), "det", range(3 * n))
    for epoch in range(draws[-1].epoch):  # the last epoch may be incomplete
        assert Counter(d.index for d in draws if d.epoch == epoch) == Counter(range(n))
    assert [d.position for d in draws] == list(range(len(draws)))


@pytest.mark.parametrize(("n", "b", "k", "r"), SHAPES)
def test_a_resumed_schedule_equals_the_uninterrupted_one(n, b, k, r):
    uninterrupted = make(n, b, k, r)
    for step in (7, 0, 3):  # in any order, since no state is carried from step to step
        assert flat(make(n, b, k, r), "det", range(step, step + 4)) == flat(uninterrupted, "det", range(step, step + 4))


def test_a_permutation_is_kept_in_as_few_bytes_as_its_numbers_need():
    for size, dtype in ((200, "uint8"), (300, "uint16"), (70_000, "uint32")):
        schedule = make(size, 1, 1, 1)
        order = [schedule.at("det", position).index for position in range(min(size, 5))]
        [kept] = schedule._permutations.values()
        expected = random_state(0, "det", "order", 0).permutation(size)
        assert kept.dtype == dtype and order == expected[:5].tolist() and (kept == expected).all()


def test_ranks_agree_on_tasks_and_differ_in_samples():
    schedules = [make(80, 2, 2, 4) for _ in range(4)]
    for step in range(5):
        assert len({s.tasks for s in schedules}) == 1
        drawn = [s.draw("det", step, k, rank) for rank, s in enumerate(schedules) for k in range(2)]
        indices = [d.index for batch in drawn for d in batch]
        assert len(set(indices)) == len(indices) == 16


def test_tasks_run_in_the_order_of_the_config():
    assert Schedule(0, {"a": 1, "b": 1}, {"b": (1, 1), "a": (1, 1)}, 1).tasks == ("b", "a")


@pytest.mark.parametrize(("b", "r"), [(4, 2), (2, 4), (1, 8)])
def test_the_sequence_over_all_ranks_does_not_depend_on_their_number(b, r):
    assert flat(make(13, b, 2, r), "det", range(6)) == flat(make(13, 8, 2, 1), "det", range(6))


def test_orders_of_epochs_tasks_and_seeds_are_independent():
    def order(seed: int, task: str, epoch: int) -> tuple[int, ...]:
        s = Schedule(seed, {"a": 50, "b": 50}, {"a": (1, 1), "b": (1, 1)}, 1)
        return tuple(s.at(task, epoch * 50 + i).index for i in range(50))

    orders = [order(*key) for key in product((0, 1), "ab", (0, 1, 2))]
    assert len(set(orders)) == len(orders)
    # Two random permutations of 50 agree in about one position.
    assert all(sum(x == y for x, y in zip(p, q, strict=True)) < 10 for p, q in zip(orders, orders[1:], strict=False))


def test_the_size_of_one_dataset_does_not_change_the_order_of_another():
    def one(size: int) -> list:
        return flat(Schedule(0, {"a": 9, "b": size}, {"a": (2, 1), "b": (1, 1)}, 2), "a", range(9))

    assert one(3) == one(1000)


def test_augmentation_seeds_differ_between_samples_and_epochs():
    seeds = [d.seed for d in flat(make(12, 2, 1, 1), "det", range(100))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_order_never_changes():
    """A run that is resumed in a different process or with a different release continues the same order."""
    schedule = Schedule(7, {"det": 10}, {"det": (5, 1)}, 1)
    assert [d.index for d in schedule.draw("det", 1, 0, 0)] == PINNED_INDICES
    assert schedule.at("det", 5).seed == PINNED_SEED


PINNED_INDICES = [0, 4, 1, 2, 9]
PINNED_SEED = 8019958117830873540


def test_epoch_counts_the_samples_of_all_ranks():
    schedule = make(12, 2, 3, 2)
    assert schedule.epoch("det", 0) == 0
    assert schedule.epoch("det", 2) == 2 * 12 / 12
    assert schedule.epoch("cls", 5) == 5 * 2 / 5


def test_a_pickled_schedule_is_small_and_equal():
    schedule = Schedule(0, {"a": 100_000}, {"a": (2, 1)}, 1)
    first = schedule.draw("a", 0, 0, 0)
    assert len(pickle.dumps(schedule)) < 1000
    assert pickle.loads(pickle.dumps(schedule)).draw("a", 0, 0, 0) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 1}, {"b": (1, 1)}, 1), r"\['a'\].*\['b'\]"),
        (({"a": 0}, {"a": (1, 1)}, 1), "size of task 'a' is 0"),
        (({"a": 1}, {"a": (0, 1)}, 1), "batch_size of task 'a' is 0"),
        (({"a": 1}, {"a": (1, 0)}, 1), "micro_steps of task 'a' is 0"),
        (({"a": 1}, {"a": (1, 1)}, 0), "world_size is 0"),
    ],
)
def test_an_impossible_number_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(0, *arguments)


def test_micro_steps_and_ranks_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"micro_step .* is 3; it must lie in 0\.\.2"):
        make(12, 2, 3, 2).draw("det", 0, 3, 0)
    with pytest.raises(ValueError, match="rank is 2"):
        make(12, 2, 3, 2).draw("det", 0, 0, 2)
