"""Runs that train parts of their parameters, or train them differently: thawed backbones, adapters, schedules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks


@pytest.fixture(scope="module")
def ranks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_parameters.py"), 2, tmp_path_factory.mktemp("ranks"), str(home))


CHECKS = ("check_thaw 0", "check_thaw 1", "check_thaw 2", "check_thaw 3", "check_thaw_across_stages")


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(ranks: dict[str, str], check: str) -> None:
    assert ranks[check] == ""
