"""Weights copied within groups of ranks (ZeRO++ hpZ): exact, resumable, and gathered among all ranks once per step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_hpz.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hpz")
    return {
        name: problem for world in (4, 2) for name, problem in run_ranks(SCRIPT, world, folder, str(folder)).items()
    }


def test_copies_within_groups_change_no_weight(results: dict[str, str]) -> None:
    wrong = {name: problem for name, problem in results.items() if problem}
    assert len(results) == 14 and not wrong, "\n".join(f"{n}:\n{p}" for n, p in wrong.items())
