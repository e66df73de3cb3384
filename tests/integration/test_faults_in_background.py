"""Faults of runs whose checkpoints are written while training continues."""

from __future__ import annotations

import pytest

from tests.integration.test_faults import run_faults

# compared with a run that saves in the step; the first with ZeRO 1, 2 and 3
FAULTS = ("run cut in pieces", "kill -9 of all ranks in a save", "kill -9 of one rank in a save",
          "SIGTERM to all ranks", "best checkpoint, save_strategy steps", "disk full while saving")  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_faults(tmp_path_factory.mktemp("background") / "table.json", "--async", "--only", *FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_in_the_background(table: dict[str, dict], fault: str) -> None:
    row = table[fault]
    if not row["tried"]:
        pytest.skip(row["notes"][0])
    assert row["kept"] == row["tried"], "\n".join(row["notes"])
