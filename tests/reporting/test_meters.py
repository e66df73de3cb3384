"""Meters: means, images per second, shares of the update."""

from __future__ import annotations

import math

import pytest
import torch

from allinone_ds.reporting.meters import LowShares, Means, Pace, update_shares


def test_means_leave_out_what_is_not_finite() -> None:
    means = Means(torch.device("cpu"))
    means.add({"a": torch.tensor(1.0), "b": 5.0})
    means.add({"a": torch.tensor(3.0), "b": math.inf})
    assert means.drain() == {"a": 2.0, "b": 5.0}
    assert means.drain() == {}
    means.add({"a": math.nan, "b": 1.0})
    assert math.isnan(means.drain()["a"])


def test_pace_counts_images_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("allinone_ds.reporting.meters.time.perf_counter", lambda: now[0])
    pace = Pace({"a": 8, "b": 2}, torch.device("cpu"))
    assert pace.drain() == {}
    for _ in range(2):
        with pace.waiting():
            now[0] += 1.0
        with pace.working():
            now[0] += 3.0
        now[0] += 100.0  # an evaluation
    found = pace.drain()
    assert found.pop("memory/peak_gib") > 0
    assert found == {
        "seconds/step": 4.0,
        "seconds/data_wait": 1.0,
        "images_per_second/a": 2.0,
        "images_per_second/b": 0.5,
    }
    assert pace.drain() == {}


def test_shares_leave_out_skipped_tasks() -> None:
    def tensors(*values: float) -> dict[str, torch.Tensor]:
        return {task: torch.tensor(value) for task, value in zip("abc", values, strict=True)}

    found = update_shares(tensors(3.0, 40.0, float("inf")), tensors(1.0, 0.1, 0.0))
    assert {task: float(value) for task, value in found.items()} == pytest.approx({"a": 0.36, "b": 0.64, "c": 0.0})
    assert torch.isnan(update_shares(tensors(1.0, 1.0, 1.0), tensors(0.0, 0.0, 0.0))["a"])


def add_steps(low: LowShares, steps: int, **shares: float) -> None:
    for _ in range(steps):
        low.add({task: torch.tensor(share) for task, share in shares.items()})


def test_a_task_that_hardly_moves_the_backbone_is_named_once_per_occurrence() -> None:
    low = LowShares(["a", "b"], torch.device("cpu"))
    add_steps(low, 99, a=0.995, b=0.005)
    assert low.drain({}) == []
    add_steps(low, 31, a=0.995, b=0.005)
    logs = {"grad_norm/b/share": 0.005, "grad_norm/b/raw": 1.5e-5, "grad_norm/b/scale": 0.25}
    (warning,) = low.drain(logs)
    for part in ("'b'", "less than 1 %", "last 130 steps", "share 5.0e-03", "1.5e-05", "factor 2.5e-01"):
        assert part in warning, part
    add_steps(low, 200, a=0.995, b=0.005)
    assert low.drain(logs) == []  # the same occurrence
    add_steps(low, 1, a=0.5, b=0.5)
    assert low.drain(logs) == []
    add_steps(low, 100, a=0.995, b=0.005)
    assert len(low.drain(logs)) == 1


def test_steps_without_an_update_and_steps_in_between_do_not_add_up() -> None:
    low = LowShares(["a", "b"], torch.device("cpu"))
    for _ in range(5):
        add_steps(low, 60, a=0.999, b=0.001)
        add_steps(low, 1, a=0.98, b=0.02)
    assert low.drain({}) == []
    add_steps(low, 60, a=0.999, b=0.001)
    add_steps(low, 50, a=math.nan, b=math.nan)  # steps that an overflow skipped
    assert low.drain({}) == []
    add_steps(low, 40, a=0.999, b=0.001)
    assert len(low.drain({})) == 1


def test_many_tasks_have_small_shares_by_nature() -> None:
    tasks = [f"t{i}" for i in range(40)]
    low = LowShares(tasks, torch.device("cpu"))
    add_steps(low, 150, **dict.fromkeys(tasks, 1 / 40))
    add_steps(low, 150, **dict.fromkeys(tasks, 0.009))
    assert low.drain({}) == []
    add_steps(low, 150, **dict.fromkeys(tasks[1:], 1 / 39), t0=0.002)
    (warning,) = low.drain({})
    assert "'t0' had less than 0.25 % of the update" in warning


def test_a_resumed_run_continues_the_count() -> None:
    low = LowShares(["a", "b"], torch.device("cpu"))
    add_steps(low, 80, a=0.999, b=0.001)
    resumed = LowShares(["b", "a", "c"], torch.device("cpu"))
    resumed.load_state_dict(low.state_dict())
    add_steps(resumed, 20, a=0.5, b=0.001, c=0.499)
    assert len(resumed.drain({})) == 1
