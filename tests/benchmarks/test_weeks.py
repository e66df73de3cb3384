"""The parts of `benchmarks/faults/weeks` that decide: schedule, verdict on growth, comparison of logs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.faults.weeks.callbacks import spoiled
from benchmarks.faults.weeks.compare import logged, unequal
from benchmarks.faults.weeks.growth import MIB, SLACK, growth, verdict
from benchmarks.faults.weeks.schedule import ENDED, SURVIVED, fault
from benchmarks.faults.weeks.soak import Soak, Stopped

ROUND = len(SURVIVED) + len(ENDED) + 1  # the network is cut twice


def test_the_schedule_depends_on_seed_and_number_only() -> None:
    in_order = [fault(3, number, 60.0) for number in range(2 * ROUND)]
    assert [fault(3, number, 60.0) for number in reversed(range(2 * ROUND))] == in_order[::-1]
    assert in_order != [fault(4, number, 60.0) for number in range(2 * ROUND)]


def test_a_round_has_every_fault_and_its_last_ones_end_the_run() -> None:
    for first in (0, ROUND, 2 * ROUND):
        kinds = [fault(0, number, 60.0).kind for number in range(first, first + ROUND)]
        assert {*kinds} == {*SURVIVED, *ENDED}
        assert {*kinds[-len(ENDED) :]} == {*ENDED}
    cuts = [one for number in range(200) if (one := fault(0, number, 60.0)).kind == "network cut"]
    assert all(5 <= one.seconds <= 60 and 30 <= one.gap <= 90 for one in cuts)


def test_the_losses_that_are_nan_are_of_every_task_and_rank() -> None:
    assert {spoiled(step, 10, 3, 4) for step in range(120)} == {None, *((t, r) for t in range(3) for r in range(4))}


def noise(values: list[float], spread: float) -> list[tuple[float, float]]:
    drawn = random.Random(0)
    return [(60.0 * minute, value + drawn.uniform(-spread, spread)) for minute, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "spread", "quantity", "grows"),
    [
        ([500 * MIB] * 60, 10 * MIB, "memory", False),
        ([(500 + minute) * MIB for minute in range(60)], 10 * MIB, "memory", True),
        ([(500 - minute) * MIB for minute in range(60)], 10 * MIB, "memory", False),
        ([500.0 * MIB] * 30 + [540.0 * MIB] * 30, MIB, "memory", True),  # a step upwards that stays
        ([80.0] * 60, 1, "descriptors", False),
        ([80.0 + minute // 10 for minute in range(60)], 1, "descriptors", True),
        ([20.0 + minute // 30 * 2 for minute in range(60)], 0, "threads", True),
        ([10.0 * MIB + minute % 7 * 3 * MIB for minute in range(60)], 0, "checkpoints", False),  # while one is written
    ],
)
def test_growth_is_told_from_noise(values: list[float], spread: float, quantity: str, grows: bool) -> None:
    found = growth(noise(values, spread), SLACK[quantity])
    assert found is not None
    assert found.grows == grows


def test_a_few_samples_allow_no_verdict() -> None:
    assert growth([(60.0 * minute, minute) for minute in range(7)], (1.0, 0.0)) is None


def samples(value: Any, starts: int = 12, each: int = 20) -> list[dict[str, Any]]:
    """Return samples of one quantity of rank 0; `value` gives it by (start, number of the sample in the start)."""
    times = [(start, number) for start in range(starts) for number in range(each)]
    of = [
        {"rank 0": {"descriptors": float(value(start, number))}, "folder of run": {"shared memory": 0.0}}
        for start, number in times
    ]
    return [{"time": 60.0 * i, "start": times[i][0], "of": of[i]} for i in range(len(times))]


@pytest.mark.parametrize(
    ("value", "grown"),
    [
        (lambda start, number: 80, set()),
        (lambda start, number: 80 + 4 * min(number, 4), set()),  # the warm-up of every process
        (lambda start, number: 80 + number, {"one start"}),
        (lambda start, number: 80 + start, {"all starts"}),
        (lambda start, number: 80 + (number if start == 7 else 0), {"one start"}),
    ],
)
def test_growth_is_found_in_a_process_and_from_start_to_start(value: Any, grown: set[str]) -> None:
    rows = verdict(samples(value))
    assert {row["over"] for row in rows if row["of"] == "rank 0"} == {"one start", "all starts"}
    assert {row["over"] for row in rows if row["grows"]} == grown


def write_log(folder: Path, name: str, *entries: dict[str, Any]) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"event": "log", "time": 1.5, **entry}) + "\n" for entry in entries) + '{"ev')
    return file


def test_a_changed_lost_or_differently_repeated_entry_is_named(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": 2.0 / step, "seconds/step": 0.1 * step, "epoch": step} for step in range(1, 6)]
    scores = {"step": 5, "eval_score": 0.25}
    expected = logged(write_log(tmp_path, "plain", *entries, scores))
    again = [{**entry, "seconds/step": 9.0, "epoch": 0.5} for entry in entries[2:]]  # a new start from step 2
    assert unequal(logged(write_log(tmp_path, "a", *entries[:4], *again, scores)), expected, 5) == []

    changed = {**entries[2], "loss": entries[2]["loss"] * (1 + 2**-52)}
    assert (
        "step 3, training" in unequal(logged(write_log(tmp_path, "b", *entries[:2], changed, *again)), expected, 5)[0]
    )
    found = unequal(logged(write_log(tmp_path, "c", *entries[:3], changed, *again, scores)), expected, 5)
    assert len(found) == 1 and "loss" in found[0]
    lost = unequal(logged(write_log(tmp_path, "d", *entries[:2], *entries[3:], scores)), expected, 5)
    assert lost == ["step 3: the run with faults has no training entry"]
    without = {key: value for key, value in entries[2].items() if key != "loss"} | {"loss": None}
    assert len(unequal(logged(write_log(tmp_path, "e", *entries[:2], without, *entries[3:], scores)), expected, 5)) == 1


def test_an_interrupted_command_continues_and_refuses_other_settings(tmp_path: Path) -> None:
    hosts: Any = SimpleNamespace(disk=tmp_path / "disk")
    soak = Soak(hosts, tmp_path, {"seed": 0, "gap": 60.0})
    soak.record["faults"] = [{"kind": "rank killed"}] * 3
    soak.record["seconds"] = soak._earlier = 1000.0
    soak.save()
    again = Soak(hosts, tmp_path, {"seed": 0, "gap": 60.0})
    assert (len(again.record["faults"]), again.record["commands"]) == (3, 2)
    assert again.seconds() >= 1000
    with pytest.raises(Stopped, match="choose a different --out"):
        Soak(hosts, tmp_path, {"seed": 1, "gap": 60.0})
