"""Weights read from ZeRO shards, and folders without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.weights import read_weights
from tests.launcher import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(Path(__file__).parent / "ranks_weights.py", 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("check", ["check_stage_1", "check_stage_2", "check_stage_3"])
def test_shards_of_every_stage_give_the_float32_masters(results: dict[str, str], check: str) -> None:
    assert results[check] == ""


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither model.safetensors nor ZeRO shards"):
        read_weights(tmp_path)
    (tmp_path / "latest").write_text("global_step1")
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="global_step1.*put together"):
        read_weights(tmp_path)
