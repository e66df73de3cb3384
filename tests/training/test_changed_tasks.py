"""Runs that sample their tasks, and resumes with other tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks


@pytest.fixture(scope="module")
def ranks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_changed_tasks.py"), 1, tmp_path_factory.mktemp("tasks"), str(home))


CHECKS = (
    "check_sampling 2", "check_sampling 3", "check_other_tasks 0", "check_other_tasks 1", "check_other_tasks 2",
    "check_other_tasks 3",
    "check_positions", "check_refusals_of_sampling", "check_next_resume", "check_refusals",
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_tasks_of_steps_and_of_resumed_runs(ranks: dict[str, str], check: str) -> None:
    assert ranks[check] == ""


@pytest.fixture(scope="module")
def adapted(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    script = Path(__file__).with_name("ranks_changed_adapters.py")
    return run_ranks(script, 1, tmp_path_factory.mktemp("adapters"), str(home))


@pytest.mark.parametrize(
    "check",
    [
        *(f"check_tasks_with_adapters {stage}" for stage in (0, 2, 3)),
        *(f"check_adapters_of_the_only_task {stage}" for stage in (2, 3)),
        "check_refusals",
    ],
)
def test_adapters_of_a_task_go_on_start_and_go_with_it(adapted: dict[str, str], check: str) -> None:
    assert adapted[check] == ""
