"""Meters: means, images per second, shares of the update."""

from __future__ import annotations

import math

import pytest
import torch

from allinone_ds.reporting.meters import Means, Pace, update_shares


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
