"""What a resume with other settings does: it uses them, exactly, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks


@pytest.fixture(scope="module")
def ranks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).with_name("ranks_resume.py"), 1, tmp_path_factory.mktemp("resume"), str(home))


CHECKS = ("check_settings 2", "check_settings 3", "check_nothing_changes", "check_length", "check_kinds",
          "check_muon 2", "check_muon 3")  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_resume_uses_the_settings_that_it_is_given(ranks: dict[str, str], check: str) -> None:
    assert ranks[check] == ""
