"""Checkpoints that are written while training goes on lose nothing and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allinone_ds.errors import ConfigError, RunError
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_folder.background_saver import BackgroundSaver
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


def test_what_is_taken_is_a_copy_whose_memory_is_used_again() -> None:
    saver = BackgroundSaver()
    flat = torch.arange(6.0)
    content = {"flat": flat, "cut": [flat[:4], (flat[2:],)], "step": torch.tensor(1.0), "name": "text"}
    places = []
    for value in (0.0, 1.0):
        flat.fill_(value)
        saver.stage(content, Path("file"))
        flat.fill_(7.0)  # the optimizer steps in place
        path, copy = saver.staged[0]
        assert path == Path("file") and copy["name"] == "text"
        for tensor in (copy["flat"], copy["cut"][0], copy["cut"][1][0]):
            assert (tensor == value).all()
        places.append(copy["flat"].data_ptr())
        saver.start(1, lambda: None)
        saver.finish()
        assert saver.staged == []
    assert places[0] == places[1] != flat.data_ptr()


@pytest.mark.parametrize("error", [OSError("no space left"), RunError("the checkpoint of step 3 could not be written")])
def test_what_the_thread_raises_is_told_once(error: Exception) -> None:
    saver = BackgroundSaver()

    def fail() -> None:
        raise error

    saver.start(3, fail)
    with pytest.raises(RunError, match="checkpoint of step 3"):
        saver.finish()
    assert not saver.working
    saver.finish()


def test_shards_are_needed(tmp_path: Path) -> None:
    usual = {"output_dir": str(tmp_path), "max_steps": 1, "deepspeed": "configs/deepspeed/zero2.json"}
    with pytest.raises(ConfigError, match="async_save with save_only_model"):
        AllInOneArguments(**usual, async_save=True, save_only_model=True)
