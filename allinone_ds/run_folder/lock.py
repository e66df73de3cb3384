"""The lock of a run's folder: one process at a time writes to it. Quick to import."""

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

PATIENCE = 120.0
"""Seconds that a run waits for one on another host that still holds its folder."""


_claimed: dict[Path, IO[str]] = {}  # closing a file would give up this process' lock on it


def claim(folder: str | Path) -> None:
    """Make this process the only one that writes to a run's folder, until it ends, however it ends.

    RUN/.lock is locked by the system: children do not inherit it, a killed process leaves none, NFS knows it between
    hosts. Where a file system has no locks, nothing is refused. A process of another host is waited for, `PATIENCE`
    seconds at most: a scheduler may start a run anew before the old one is gone, and a file server keeps the locks of
    a host that died for a while. A second claim by the same process is no error.

    Raises:
        ConfigError: another process has claimed it, or nothing can be written there.
    """
    folder = Path(folder)
    if folder.resolve() in _claimed:
        return
    until = time.monotonic() + PATIENCE
    file, holder = _try_lock(folder)
    if holder:
        print(f"waiting for {holder}, which writes to {folder}", flush=True)
    while holder:
        file.close()
        if holder.endswith(f" {socket.gethostname()}") or time.monotonic() > until:
            raise _in_use(folder, holder)
        time.sleep(1)
        file, holder = _try_lock(folder)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only nobody knows whose it is
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _claimed[folder.resolve()] = file


def check_free(folder: str | Path) -> None:
    """Refuse a folder that another process has claimed, and claim nothing.

    Raises:
        ConfigError: it has, or nothing can be written there.
    """
    file, holder = _try_lock(Path(folder))
    file.close()
    if holder:
        raise _in_use(folder, holder)


def _try_lock(folder: Path) -> tuple[IO[str], str]:
    """The lock's file, and whose it is when it is not this process' now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written to ({error.strerror}); give another output_dir"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return file, file.read() or "another process"
    return file, ""


def _in_use(folder: str | Path, holder: str) -> ConfigError:
    return ConfigError(
        f"output_dir: {holder} is writing to {folder}, and two runs would spoil each other's files; wait for its end, "
        "end it, or give another output_dir"
    )
