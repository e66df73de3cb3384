"""Broken images are counted over the whole run."""

from __future__ import annotations

import pytest
import torch

from allinone_ds.balance.report import StepReport
from allinone_ds.data.schedule import Schedule
from allinone_ds.errors import DataError
from allinone_ds.reporting.logs import TaskLogs


def test_broken_images_are_counted_over_the_run_and_limited() -> None:
    logs = TaskLogs(Schedule(0, {"a": 4}, {"a": (2, 1)}, 1), {"a": 2}, torch.device("cpu"), max_broken_images=4)
    earlier = [{"broken_images": 2}]  # what a resumed run finds
    logs.add_broken(["a.jpg: cut off"])
    assert logs.drain(1, earlier)["broken_images"] == 3
    assert logs.drain(2, [])["broken_images"] == 3
    logs.add_broken(["b.jpg: cut off", "c.jpg: cut off"])
    with pytest.raises(DataError, match="(?s)5 images.*max_broken_images allows 4.*b.jpg"):
        logs.drain(3, [])


def test_a_task_without_influence_is_a_warning_of_the_log_and_survives_a_resume() -> None:
    def logs() -> TaskLogs:
        return TaskLogs(Schedule(0, {"a": 4, "b": 4}, {"a": (2, 1), "b": (2, 1)}, 1), {}, torch.device("cpu"), 0)

    norms = {"a": torch.tensor(1.0), "b": torch.tensor(1e-5)}
    ones = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    first, second = logs(), logs()
    for _ in range(60):
        first.add(StepReport(norms=norms, scales=ones, losses=ones, whole_norms=norms))
    first.drain(60, [])
    assert first.warnings == []
    second.load_state_dict(first.state_dict())
    for _ in range(60):
        second.add(StepReport(norms=norms, scales=ones, losses=ones, whole_norms=norms))
    second.drain(120, [])
    (warning,) = second.warnings
    assert "task 'b'" in warning and "last 120 steps" in warning and "1.0e-05 before scaling" in warning
    second.drain(120, [])
    assert second.warnings == []
