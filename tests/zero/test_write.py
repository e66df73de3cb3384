"""Failed writes of DeepSpeed's checkpoint files are noticed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from allinone_ds.zero.checkpoint.write import CheckpointFiles


def test_failed_writes_are_noted_only_while_the_engine_saves(tmp_path: Path) -> None:
    files = CheckpointFiles(SimpleNamespace(zipfile_serialization=True))  # type: ignore[arg-type]
    with pytest.raises((OSError, RuntimeError)):
        files.save({}, str(tmp_path / "none" / "file.pt"))
    files.errors = []
    files.save({}, str(tmp_path / "none" / "file.pt"))
    assert len(files.errors) == 1 and files.errors[0].startswith("file.pt: ")
