"""The errors that users see. All derive from `AllInOneError`, which holds the exit code of the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """Return text that every file and terminal accepts: bytes of file names that are not UTF-8 become `\\udcXX`.

    Example:
        >>> printable("caf\\udce9.jpg")
        'caf\\\\udce9.jpg'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def print_every_name() -> None:
    """Let stdout and stderr show text that their encoding lacks as escapes, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


REQUEUE = 75
"""Exit code of a run that saved a checkpoint and ended because of a signal: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Exit code of a command that an interrupt (Ctrl-C) ended."""
EXIT_CODES = {
    0: "success",
    1: "a run failed or cannot continue; `check` found errors only in the data; `doctor` found an error",
    2: "invalid configuration, data or command line; `check` found errors in the settings",
    REQUEUE: "SIGTERM or SIGUSR1 ended a run after it saved a checkpoint: start it again with `--resume`",
    INTERRUPTED: "interrupted (Ctrl-C); a run saves a checkpoint first",
}
"""Exit code of a command -> what it means. A rank that the system kills gives its run the code 256 - signal."""


class AllInOneError(Exception):
    """Base class of all errors whose message is written for the user."""

    exit_code: int = 1
    """Exit code of a command that this error ends."""
    on_all_ranks: bool = False
    """Whether every rank raises the error with the same message, so that only rank 0 prints it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(AllInOneError, ValueError):
    """An invalid configuration. The message names the field, what was found, what is allowed and what to do."""

    exit_code = 2
    on_all_ranks = True


class UnsupportedEngine(ConfigError):
    """A DeepSpeed engine or setting with which the balanced gradients would be wrong."""


class DataError(AllInOneError):
    """Invalid data. The message names the file, what was found, what is allowed and what to do.

    Args:
        message: text for the user.
        problems: list of `allinone_ds.data.base.Problem`, one per fault; empty if only the message is known.
    """

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Any] = ()):
        super().__init__(message)
        self.problems = list(problems)


class BrokenSample(AllInOneError):
    """A sample that cannot be read. Training counts it and uses the next sample in the order instead.

    Args:
        path: the file.
        reason: why it cannot be read.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


class BalancerError(AllInOneError, RuntimeError):
    """An incorrect use of the balancer. No weight, optimizer state or schedule was changed."""


class NonFinite(AllInOneError, RuntimeError):
    """A loss, gradient or factor that is not finite, in a step that is therefore not executed. No weight was changed.

    Args:
        tasks: names of the tasks that it concerns.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__(f"task(s) {', '.join(tasks)}: loss, gradient or factor is not finite; no weight was changed")
        self.tasks = tasks


class RunError(AllInOneError):
    """A run that cannot continue. The message says what happened, where, and what to do.

    Args:
        message: text for the user.
        on_all_ranks: whether every rank raises the error with the same message, so that only rank 0 prints it.
    """

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class RunFailed(AllInOneError):
    """A run that was started by the launcher and failed.

    Args:
        message: the error message of the run, or the last lines of its log.
        exit_code: exit code of the launcher.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
