"""Which tasks a step runs: exact numbers of tasks, their probabilities, and the refusal of what would never run."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from allinone_ds.data.loading.sampling import Sampling, TaskSampling
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.errors import ConfigError

SIZES = {"a": 100, "b": 400, "c": 1600, "d": 25}


def counts(sampling: TaskSampling, steps: int) -> dict[str, int]:
    return {name: sampling.runs(name, steps) for name in sampling.names}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"tasks_per_step": 2}, [0.5, 0.5, 0.5, 0.5]),
        ({"tasks_per_step": 1, "weights": "size"}, [100 / 2125, 400 / 2125, 1600 / 2125, 25 / 2125]),
        ({"tasks_per_step": 1, "weights": "size", "temperature": 2}, [10 / 75, 20 / 75, 40 / 75, 5 / 75]),
        ({"tasks_per_step": 2, "weights": {"a": 1, "b": 2, "c": 96, "d": 1}}, [0.25, 0.5, 1, 0.25]),
        ({"tasks_per_step": 3, "weights": {"a": 1, "b": 1, "c": 98, "d": 0}}, [1, 1, 1, 0]),
        ({"tasks_per_step": 1, "weights": {"a": 1, "b": 1, "c": 2}, "every": {"d": 4}}, [0.25, 0.25, 0.5, 0.25]),
    ],
)
def test_tasks_have_their_probabilities_and_steps_their_number(options: dict[str, Any], wanted: list[float]) -> None:
    sampling, steps = TaskSampling(Sampling(**options), SIZES, seed=1), 20_000
    found = np.array(list(counts(sampling, steps).values())) / steps
    error = np.sqrt(np.array(wanted) * (1 - np.array(wanted)) / steps)
    assert (abs(found - wanted) <= 4 * error + 1e-9).all(), found
    drawn = [[name for name in sampling.tasks(step) if name not in options.get("every", ())] for step in range(3000)]
    assert {len(names) for names in drawn} == {options["tasks_per_step"]}


def test_a_step_depends_on_seed_and_step_alone() -> None:
    options = Sampling(tasks_per_step=2, weights="size")
    first, other, seeded = (TaskSampling(options, SIZES, seed) for seed in (0, 0, 1))
    steps = [5000, 3, 1023, 1024, 99_999, 0]
    assert [first.tasks(step) for step in steps] == [other.tasks(step) for step in reversed(steps)][::-1]
    assert [first.tasks(step) for step in range(99)] != [seeded.tasks(step) for step in range(99)]
    assert [first.tasks(step) for step in range(6)] == PINNED
    for step in (0, 1, 1023, 1024, 1025, 4000):
        assert first.runs("a", step) == sum("a" in first.tasks(s) for s in range(step))
    assert pickle.loads(pickle.dumps(first)).tasks(7) == first.tasks(7)


PINNED = [("b", "c"), ("b", "c"), ("a", "c"), ("b", "c"), ("b", "c"), ("b", "c")]


def test_tasks_start_and_their_weights_are_interpolated() -> None:
    weights = {"a": 1, "b": {0: 0, 10_000: 1}, "c": {10_000: 1, 20_000: 0}, "d": 1}
    sampling = TaskSampling(Sampling(tasks_per_step=1, weights=weights, start={"d": 20_000}), SIZES, 0)
    at = {step: counts(sampling, step) for step in (10_000, 20_000, 30_000)}
    rising = np.mean([x / (2 + x) for x in np.linspace(0, 1, 10_000)])  # weights 1, x, 1, 0
    assert at[10_000]["b"] == pytest.approx(10_000 * rising, abs=4 * 45) and at[10_000]["d"] == 0
    falling = np.mean([x / (2 + x) for x in np.linspace(1, 0, 10_000)])
    assert at[20_000]["c"] - at[10_000]["c"] == pytest.approx(10_000 * falling, abs=4 * 45) and at[20_000]["d"] == 0
    assert at[30_000]["c"] == at[20_000]["c"] and at[30_000]["d"] == pytest.approx(10_000 / 3, abs=4 * 47)
    fixed = TaskSampling(Sampling(every={"a": 3}, start={"a": 4, "b": 2}), SIZES, 0)
    assert [step for step in range(12) if "a" in fixed.tasks(step)] == [4, 7, 10]
    assert [fixed.runs(name, 12) for name in SIZES] == [3, 10, 12, 12]


def test_a_length_in_epochs_is_exact() -> None:
    sampling = TaskSampling(Sampling(tasks_per_step=1, weights="size"), SIZES, 0)
    for runs in (1, 7, 300):
        steps = sampling.steps_for("d", runs)
        assert sampling.runs("d", steps) == runs == sampling.runs("d", steps - 1) + 1
    with pytest.raises(ConfigError, match="'b' runs in 0 of the first 10"):
        TaskSampling(Sampling(tasks_per_step=1, weights={"a": 1, "b": 0}), {"a": 1, "b": 1}, 0).steps_for("b", 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": {"e": 2}}, "sampling.every.e: the run has no such task or joint group"),
        ({"weights": "size"}, "sampling.weights has no effect.*set sampling.tasks_per_step"),
        ({"temperature": 2}, "sampling.temperature has no effect"),
        ({"tasks_per_step": 4}, "nothing to choose, there are 4 tasks"),
        ({"tasks_per_step": 2, "every": {"a": 2, "b": 2}}, "nothing to choose, there are 2 tasks"),
        ({"tasks_per_step": 1, "weights": {"a": 1}}, "sampling.weights has no number for 'b'"),
        (
            {"tasks_per_step": 1, "weights": {"a": 1, "b": 1, "c": 1, "d": 1}, "every": {"d": 2}},
            "weights.d: sampling.ev",
        ),
        ({"tasks_per_step": 1, "weights": {"a": {}}}, "sampling.weights.a is empty"),
        ({"tasks_per_step": 1, "weights": {"a": -1}}, "greater than or equal to 0"),
        ({"every": {"a": 0}}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskSampling(Sampling(**options), SIZES, 0)


def test_the_samples_of_a_task_follow_each_other_whenever_it_runs() -> None:
    sampling = TaskSampling(Sampling(tasks_per_step=2, weights="size"), SIZES, 3)
    schedule = Schedule(3, SIZES, dict.fromkeys(SIZES, (2, 2)), 2, sampling=sampling)
    positions = [
        draw.position
        for step in range(200)
        if "a" in schedule.tasks_of(step)
        for k in range(2)
        for rank in range(2)
        for draw in schedule.draw("a", step, k, rank)
    ]
    assert positions == list(range(8 * sampling.runs("a", 200))) and schedule.epoch("a", 200) == len(positions) / 100
    plain = Schedule(3, SIZES, dict.fromkeys(SIZES, (2, 2)), 2)
    assert schedule.at("a", 5) == plain.at("a", 5)


def test_a_task_goes_on_where_an_earlier_run_was_under_its_earlier_name() -> None:
    before = Schedule(0, {"old": 30, "b": 9}, {"old": (3, 1), "b": (2, 1)}, 1)
    now = Schedule(0, {"new": 30, "old": 30, "b": 9}, {"new": (5, 1), "old": (3, 1), "b": (4, 1)}, 1)
    state = before.state(4)
    now.continue_from(4, {"new": state["old"], "b": state["b"]})
    assert [now.at("new", p) for p in range(40)] == [before.at("old", p) for p in range(40)]
    assert [draw.position for draw in now.draw("new", 5, 0, 0)] == [17, 18, 19, 20, 21]
    assert [draw.position for draw in now.draw("b", 4, 0, 0)] == [8, 9, 10, 11]
    assert now.position("old", 4) == 0 and now.at("old", 0) != before.at("old", 0)  # a new task, an order of its own
    assert now.state(6)["new"] == (22, "old") and now.state(6)["old"] == (6, "old+")
