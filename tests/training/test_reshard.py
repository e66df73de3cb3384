"""A checkpoint goes on with other ranks and another ZeRO stage, in every precision, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher import run_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reshard")
    return {world: run_ranks(HERE / "ranks_reshard.py", world, folder, str(folder)) for world in (2, 4, 1)}


@pytest.mark.parametrize("world", [2, 4, 1])
def test_masters_moments_averages_and_losses_stay(results: dict[int, dict[str, str]], world: int) -> None:
    wrong = {name: problem for name, problem in results[world].items() if problem}
    assert len(results[world]) >= 24 and not wrong, "\n".join(f"{n}:\n{p}" for n, p in list(wrong.items())[:3])
