"""Weights read from ZeRO shards, and folders without weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder import weights
from allinone_ds.run_folder.weights import open_weights, read_weights, shapes_of
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


def test_weights_to_start_from_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 8 ranks of a host would hold 27 GB of a model with 7 billion parameters."""
    saved = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(6).view(2, 3), "c": torch.zeros(())}
    save_file(saved, tmp_path / "model.safetensors")
    read: list[str] = []
    original = weights.safe_open

    def watched(*args):
        opened = original(*args)
        return SimpleNamespace(
            __enter__=opened.__enter__, keys=opened.keys, get_slice=opened.get_slice,
            get_tensor=lambda name: (read.append(name), opened.get_tensor(name))[1],
        )  # fmt: skip

    monkeypatch.setattr(weights, "safe_open", lambda *args: contextlib.nullcontext(watched(*args)))
    state, source = open_weights(tmp_path)
    assert source == tmp_path / "model.safetensors"
    assert shapes_of(state) == {"a": (3,), "b": (2, 3), "c": ()} and set(state) == set(saved) and not read
    assert state["a"].dtype == torch.float32 and state["b"].dtype == torch.int64 and read == ["a", "b"]
    whole, _ = read_weights(tmp_path)
    assert all(torch.equal(state[name], whole[name]) for name in saved)
    with pytest.raises(KeyError):
        state["d"]
