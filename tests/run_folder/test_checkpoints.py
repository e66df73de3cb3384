"""Checkpoints of a run: which one is resumed, and which ones are deleted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.checkpoints import (
    check_resume,
    checkpoint_to_resume,
    checkpoints,
    clear_run,
    clear_unfinished,
    mark_broken,
    parse_resume,
    prune,
)
from allinone_ds.zero.checkpoint.write import CheckpointFiles
from tests.run_folder.small_checkpoint import checkpoint


def test_the_last_complete_checkpoint_is_resumed_and_broken_ones_are_named(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 10)]
    assert checkpoint_to_resume(True, tmp_path) == (paths[2], [])
    (paths[2] / "weights").write_bytes(b"")
    (paths[1] / "inner" / "state").unlink()
    found, broken = checkpoint_to_resume(parse_resume("true"), tmp_path)
    assert found == paths[0]
    assert [path for path, _ in broken] == [paths[2], paths[1]]
    assert "weights has 0 bytes" in broken[0][1] and "state is missing" in broken[1][1]
    with pytest.raises(ConfigError, match="checkpoint-10.*is broken.*weights"):
        checkpoint_to_resume(str(paths[2]), tmp_path)
    aside = mark_broken(paths[2])
    assert aside.is_dir() and checkpoints(tmp_path) == paths[:2]
    (paths[0] / "weights").unlink()
    with pytest.raises(ConfigError, match="no checkpoint in .* is complete"):
        checkpoint_to_resume(True, tmp_path)


def test_unfinished_checkpoints_are_never_picked_and_are_cleared(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4).rename(tmp_path / ".unfinished-checkpoint-4")
    assert checkpoint_to_resume(True, tmp_path) == (whole, [])
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (None, None, [2, 4, 6, 10]),
        (2, None, [6, 10]),
        (1, "elsewhere/checkpoint-4", [4, 10]),
        (2, "checkpoint-10", [6, 10]),
        (3, "checkpoint-2", [2, 6, 10]),
    ],
)
def test_the_last_and_the_best_are_not_pruned(tmp_path: Path, keep: int | None, best: str | None, kept: list) -> None:
    for step in (2, 4, 6, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2.mine").mkdir()  # a copy of the user's is no checkpoint of the run
    prune(tmp_path, keep, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(f"checkpoint-{s}" for s in kept), "checkpoint-2.mine"]
    )


class _Thief:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("stolen",)


def test_checkpoints_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.ones(2), "more": _Thief()}, "bad.pt")
    files = CheckpointFiles(SimpleNamespace(zipfile_serialization=True))  # type: ignore[arg-type]
    with pytest.raises(pickle.UnpicklingError):
        files.load("bad.pt")
    assert not Path("stolen").exists()


def test_clearing_a_run_leaves_other_files_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", ".unfinished-checkpoint-11", "broken-checkpoint-7", "plots", "notes"):
        (tmp_path / name).mkdir()
    for name in ("config.yaml", "mine.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    clear_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "notes"]


def test_a_folder_with_checkpoints_is_not_trained_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        check_resume(True, tmp_path)
    check_resume(None, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    check_resume(True, tmp_path)
    with pytest.raises(ConfigError, match="checkpoint-3"):
        check_resume(None, tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        check_resume(str(tmp_path / "checkpoint-4"), tmp_path)
