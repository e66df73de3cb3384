"""The event log survives a line that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allinone_ds.errors import RunError
from allinone_ds.reporting.run_history import read_run
from allinone_ds.run_folder.disk import explained_disk_errors
from allinone_ds.run_folder.event_log import EventLog
from allinone_ds.training.launcher import _tail


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("begin", step=0)
    with log.path.open("a") as file:
        file.write('{"event": "lo')
    followed = _tail(log.path)
    assert next(followed) == []  # what was there before counts for nothing
    log.write("begin", step=3)
    assert [event["step"] for event in next(followed)] == [3]
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()[::2]] == [0, 3]


def test_notes_and_warnings_before_the_start_are_no_restart(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.on_note(0, "43 of 43 tensors loaded")
    log.on_warning(0, "one class has no box")
    log.write("begin", step=0, max_steps=4)
    assert read_run(tmp_path).events == [(0, "43 of 43 tensors loaded"), (0, "one class has no box")]
    log.write("begin", step=2, max_steps=4)
    assert read_run(tmp_path).events[-1] == (2, "started again")


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=rf"{tmp_path}/log.jsonl cannot be written \(No space left on device;.*free some space"
    ):
        with explained_disk_errors(tmp_path):
            EventLog(tmp_path).write("begin", step=0)
