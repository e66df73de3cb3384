"""The lock of a run's folder: only one process at a time writes to the folder. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.names import LOCK_FILE

MAX_WAIT = 120.0
"""Seconds to wait for a process on a different host that holds the lock."""


_locked: dict[Path, IO[str]] = {}  # closing one of these files would release its lock


def lock_folder(folder: str | Path) -> None:
    """Lock a run's folder for this process until the process ends. Locking it again has no effect.

    RUN/.lock is locked with `fcntl`: child processes do not inherit the lock, the system releases it when the process
    ends for any reason, and NFS shares it between hosts. On a file system without locks nothing is refused. If a
    process on a different host holds the lock, wait for up to `MAX_WAIT` seconds: a scheduler may start a run again
    before the old one has ended, and a file server keeps the locks of a lost host for a while.

    Raises:
        ConfigError: a different process holds the lock, or the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.resolve() in _locked:
        return
    deadline = time.monotonic() + MAX_WAIT
    file, holder = _try_lock(folder)
    if holder:
        print(f"waiting for {holder}, which is writing to {folder}", flush=True)
    while holder:
        file.close()
        if holder.endswith(f" {socket.gethostname()}") or time.monotonic() > deadline:
            raise _in_use(folder, holder)
        time.sleep(1)
        file, holder = _try_lock(folder)
    with contextlib.suppress(OSError):  # on a full disk the lock holds, but the name of its holder is missing
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _locked[folder.resolve()] = file


def check_free(folder: str | Path) -> None:
    """Refuse a folder that a different process has locked; do not lock it.

    Raises:
        ConfigError: the folder is locked, or cannot be written to.
    """
    file, holder = _try_lock(Path(folder))
    file.close()
    if holder:
        raise _in_use(folder, holder)


def _try_lock(folder: Path) -> tuple[IO[str], str]:
    """Try to lock a folder; return the lock file, and the holder of the lock if it is not this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written to ({error.strerror}); choose a different output_dir"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return file, file.read() or "an unknown process"
    return file, ""


def _in_use(folder: str | Path, holder: str) -> ConfigError:
    return ConfigError(
        f"output_dir: {holder} is writing to {folder}, and two runs would overwrite each other's files; wait until it "
        "ends, end it, or choose a different output_dir"
    )
