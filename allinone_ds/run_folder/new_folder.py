"""Remove the folder of a run that failed before it trained. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from allinone_ds.run_folder.names import EVENTS_FILE, LOCK_FILE, LOG_FILE

_AT_START = {LOCK_FILE, LOG_FILE, EVENTS_FILE}  # what a run writes before training begins


def missing_folders(folder: str | Path) -> list[Path]:
    """Return the folder and its parents that do not exist, the innermost first.

    Call it before the folder is created, and give the result to `remove_failed_start`.
    """
    folder = Path(folder)
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_failed_start(made: Sequence[Path]) -> bool:
    """Remove the folders that a run created, if it wrote only what a start writes and training never began.

    Args:
        made: from `missing_folders`; empty if the folder existed, which is then never touched.

    Returns:
        Whether the folder of the run is gone.
    """
    if not made or not made[0].is_dir():
        return bool(made)
    folder = made[0]
    files = list(folder.iterdir())
    if not {file.name for file in files} <= _AT_START or _began(folder / EVENTS_FILE):
        return False
    for file in files:
        file.unlink()
    with contextlib.suppress(OSError):  # a parent that something else has used since
        for path in made:
            path.rmdir()
    return not folder.exists()


def _began(events: Path) -> bool:
    """Return whether a log of events, whose last line may be cut off, has one of training."""
    if not events.exists():
        return False
    for line in events.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["event"] != "warning":
                return True
    return False
