"""One process at a time writes to the folder of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder import lock
from allinone_ds.run_folder.checkpoints import (
    checkpoints,
    clear_run,
)
from allinone_ds.run_folder.lock import check_free, lock_folder
from allinone_ds.training.launcher import follow_run
from tests.run_folder.small_checkpoint import checkpoint

ROOT = Path(__file__).parents[2]


def test_one_process_writes_to_a_folder(tmp_path: Path) -> None:
    words = "import sys; from allinone_ds.run_folder import lock; lock.lock_folder(sys.argv[1]); print(); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        checkpoint(tmp_path, 2)
        for refused in (lock_folder, check_free, clear_run):
            with pytest.raises(ConfigError, match=f"process {holder.pid} on .* is writing to"):
                refused(tmp_path)
        with pytest.raises(ConfigError, match="is writing to"):
            follow_run([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path, print)
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        lock_folder(tmp_path)
    assert checkpoints(tmp_path)


def test_a_run_on_a_different_host_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ["process 7 on elsewhere"] * 3
    real = lock._try_lock
    monkeypatch.setattr(lock, "_try_lock", lambda folder: (real(folder)[0], held.pop()) if held else real(folder))
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    lock_folder(tmp_path)
    assert not held and capsys.readouterr().out.count("waiting for process 7 on elsewhere") == 1
    held = ["process 7 on elsewhere"] * 9
    monkeypatch.setattr(lock, "MAX_WAIT", -1.0)
    with pytest.raises(ConfigError, match="process 7 on elsewhere is writing to"):
        lock_folder(tmp_path / "other")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run cannot be written to .*choose a different output_dir"):
        lock_folder(tmp_path / "file" / "run")
