"""A start that failed leaves no folder, and nothing else is ever removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from allinone_ds.run_folder.new_folder import missing_folders, remove_failed_start

START = (".lock", "train.log", "log.jsonl")


def start(folder: Path, *files: str, events: str = '{"event": "warning", "message": "x"}\n{"eve') -> list[Path]:
    made = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*START, *files):
        (folder / name).write_text(events if name == "log.jsonl" else "")
    return made


def test_a_failed_start_is_removed_with_the_parents_that_it_made(tmp_path: Path) -> None:
    assert remove_failed_start(start(tmp_path / "runs" / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    made = start(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "other").mkdir()  # of a different run, created meanwhile
    assert remove_failed_start(made)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["checkpoint-2", "notes.txt", "model.safetensors", "config.yaml"])
def test_a_folder_with_anything_else_stays_whole(tmp_path: Path, name: str) -> None:
    assert not remove_failed_start(start(tmp_path / "run", name))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*START, name}


def test_a_folder_that_existed_or_whose_training_began_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    assert not remove_failed_start(start(tmp_path / "before"))
    assert not remove_failed_start(start(tmp_path / "began", events='{"event": "begin", "step": 0}\n'))
    assert all((tmp_path / run / name).exists() for run in ("before", "began") for name in START)


def test_a_folder_that_was_never_created_needs_nothing(tmp_path: Path) -> None:
    assert remove_failed_start(missing_folders(tmp_path / "none"))
