"""End a rank when the command or the launcher that started it has ended without stopping the rank."""

from __future__ import annotations

import os
import signal
import threading

import psutil

COMMAND = "ALLINONE_DS_COMMAND"
"""Environment variable: process id of the command that started the run on this machine."""


def end_with_command() -> None:
    """Send SIGTERM to this process when the command that started the run, or the launcher, has ended.

    A command that is killed with SIGKILL cannot stop its ranks. A training rank then saves a checkpoint and exits, as
    after every SIGTERM. Without the variable `COMMAND`, as under other launchers, nothing is watched.
    """
    command = os.environ.get(COMMAND)
    if command:
        for process in {int(command), os.getppid()}:
            threading.Thread(target=_end_after, args=(process,), daemon=True).start()


def _end_after(process: int) -> None:
    try:
        psutil.Process(process).wait()
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
