"""Explain a file of a run that cannot be written because its disk is full or read-only."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from allinone_ds.errors import RunError

_FULL = 2**16
"""A disk with less free space than this, in bytes, is reported as full."""
_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def free_bytes(folder: Path) -> float:
    """Return the free bytes of the folder's disk; infinity if they cannot be determined."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def is_full(folder: Path) -> bool:
    """Return whether the folder's disk is full. Neither torch nor safetensors raises an `OSError` then."""
    return free_bytes(folder) < _FULL


@contextlib.contextmanager
def explained_disk_errors(run: Path) -> Iterator[None]:
    """Explain an error of a full or read-only disk: beside checkpoints, a run writes its log, results and pictures.

    Args:
        run: folder of the run.

    Raises:
        RunError: names the file if the system does, the reason and the free space.

    Example:
        >>> with explained_disk_errors(Path("/")):
        ...     raise OSError(errno.EROFS, "Read-only file system", "/runs/mine/log.jsonl")
        Traceback (most recent call last):
        allinone_ds.errors.RunError: /runs/mine/log.jsonl cannot be written (Read-only file system; ...
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if error.errno not in _ERRORS if isinstance(error, OSError) else not is_full(run):
            raise
        file = isinstance(error, OSError) and error.filename or f"a file of {run}, or what the run prints,"
        reason = error.strerror if isinstance(error, OSError) else "no space left on device"
        raise RunError(
            f"{file} cannot be written ({reason}; {free_bytes(run) / 2**20:,.1f} MiB are free on the disk of {run}). "
            "Complete checkpoints are unchanged; free some space or repair the disk, then resume with --resume"
        ) from error
