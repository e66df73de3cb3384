"""A checkpoint gets its name once all of it is on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from allinone_ds.run_folder.atomic_checkpoint import CheckpointWriter
from allinone_ds.run_folder.manifest import MANIFEST_FILE, faults_of


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []  # the system's own, with the number of the file or folder that they are of
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("sync", os.fstat(handle).st_ino)))
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        calls.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    writer = CheckpointWriter(tmp_path, 2)
    (writer.folder / "inner").mkdir()
    for name in ("latest", "inner/shard"):
        (writer.folder / name).write_text(name)
    writer.publish()
    names = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
    found = [(what, names[number]) for what, number in calls]
    assert set(found[:2]) == {("sync", "latest"), ("sync", "shard")}
    assert found[2] == ("sync", MANIFEST_FILE)  # says what the files are: after them
    assert set(found[3:5]) == {("sync", "inner"), ("sync", "checkpoint-2")}
    assert found[5:] == [("rename", "checkpoint-2"), ("sync", tmp_path.name)]
    assert faults_of(tmp_path / "checkpoint-2") == []
