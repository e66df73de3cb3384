"""Broken images are counted over the whole run, each of them once."""

from __future__ import annotations

import pytest
import torch

from allinone_ds.balance.report import StepReport
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.errors import DataError
from allinone_ds.reporting.logs import MOST_IN_MEMORY, TaskLogs, thin_history


def new_logs(limit: int) -> TaskLogs:
    return TaskLogs(Schedule(0, {"a": 4}, {"a": (2, 1)}, 1), {"a": 2}, torch.device("cpu"), max_broken_images=limit)


def test_broken_images_are_counted_over_the_run_and_limited() -> None:
    logs = new_logs(4)
    logs.add_broken(["a.jpg: cut off", "b.jpg: cut off", "c.jpg: cut off"])
    assert logs.drain(1)["broken_images"] == 3
    assert logs.drain(2)["broken_images"] == 3
    logs.add_broken(["d.jpg: cut off", "e.jpg: cut off"])
    with pytest.raises(DataError, match="(?s)5 images.*max_broken_images allows 4.*d.jpg"):
        logs.drain(3)


def test_a_file_counts_once_in_every_epoch_together() -> None:
    logs = new_logs(1)
    for step in range(5):
        logs.add_broken(["a.jpg: cut off"] * 3)
        assert logs.drain(step)["broken_images"] == 1


def test_a_resumed_run_continues_the_count_and_is_not_forbidden() -> None:
    logs = new_logs(2)
    logs.add_broken(["a.jpg: cut off", "b.jpg: cut off"])
    logs.drain(1)
    logs.add_broken(["b.jpg: cut off"])
    resumed = new_logs(2)
    resumed.load_state_dict(logs.state_dict())
    assert resumed.drain(2)["broken_images"] == 2
    lower = new_logs(1)  # the files were repaired, and the limit was lowered
    lower.load_state_dict({**logs.state_dict(), "broken": []})
    assert lower.drain(2)["broken_images"] == 2
    lower.add_broken(["c.jpg: cut off"])
    with pytest.raises(DataError, match="3 images could not be read"):
        lower.drain(3)


def test_a_checkpoint_of_an_earlier_release_is_read() -> None:
    state = new_logs(2).state_dict()
    del state["broken_files"]
    logs = new_logs(2)
    logs.load_state_dict({**state, "broken": ["a.jpg: cut off"]})
    assert logs.drain(1)["broken_images"] == 1


def test_a_task_without_influence_is_a_warning_of_the_log_and_survives_a_resume() -> None:
    def logs() -> TaskLogs:
        return TaskLogs(Schedule(0, {"a": 4, "b": 4}, {"a": (2, 1), "b": (2, 1)}, 1), {}, torch.device("cpu"), 0)

    norms = {"a": torch.tensor(1.0), "b": torch.tensor(1e-5)}
    ones = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    first, second = logs(), logs()
    for _ in range(60):
        first.add(StepReport(norms=norms, scales=ones, losses=ones, whole_norms=norms))
    first.drain(60)
    assert first.warnings == []
    second.load_state_dict(first.state_dict())
    for _ in range(60):
        second.add(StepReport(norms=norms, scales=ones, losses=ones, whole_norms=norms))
    second.drain(120)
    (warning,) = second.warnings
    assert "task 'b'" in warning and "last 120 steps" in warning and "1.0e-05 before scaling" in warning
    second.drain(120)
    assert second.warnings == []


def test_the_history_of_a_long_run_stays_short_and_covers_all_of_it() -> None:
    history: list[dict[str, float]] = []
    for step in range(1, 10 * MOST_IN_MEMORY):
        history.append({"step": step, "loss": 1.0})
        if step % 1000 == 0:
            history.append({"step": step, "eval_score": 0.5})
        thin_history(history)
        assert len(history) <= MOST_IN_MEMORY + 20
        assert len(history) >= min(step, MOST_IN_MEMORY / 4)
    steps = [int(entry["step"]) for entry in history]
    assert steps == sorted(steps)
    assert len([entry for entry in history if "eval_score" in entry]) == 19
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    assert steps[0] == 1 and steps[-1] == 10 * MOST_IN_MEMORY - 1 and max(gaps) <= 60
