"""The errors that a user sees. All derive from `AllInOneError`, which knows the exit status of a command they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REQUEUE = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


class AllInOneError(Exception):
    """Base of every error with a message for the user."""

    exit_code: int = 1
    """Exit status of a command that ends with this error."""
    on_all_ranks: bool = False
    """Whether every rank raises the error with the same words, so only one of them prints it."""


class ConfigError(AllInOneError, ValueError):
    """A configuration that cannot be used. The message names the field, what was found and what is allowed."""

    exit_code = 2
    on_all_ranks = True


class UnsupportedEngine(ConfigError):
    """A DeepSpeed engine, or a setting of it, with which balanced gradients would be wrong."""


class DataError(AllInOneError):
    """Data that cannot be trained on. The message names the file, what was found, what is allowed and what to do.

    Args:
        message: the text for the user.
        problems: every fault behind it (`allinone_ds.data.Problem`), where there is a list.
    """

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Any] = ()):
        super().__init__(message)
        self.problems = list(problems)


class BrokenSample(AllInOneError):
    """One sample that cannot be read. Training takes the next sample of the order instead and counts it.

    Args:
        path: the file.
        reason: why it cannot be read.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BalancerError(AllInOneError, RuntimeError):
    """The balancer was used wrongly; no weight, optimizer state or schedule was changed."""


class NonFinite(AllInOneError, RuntimeError):
    """Tasks whose loss or gradient was not finite, in a step that is not to be taken; nothing was changed.

    Args:
        tasks: their names.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__(f"task(s) {', '.join(tasks)}: loss or gradient is not finite; no weight was changed")
        self.tasks = tasks


class RunError(AllInOneError):
    """A run that cannot go on. The message says what happened, where, and what to do.

    Args:
        message: the text for the user.
        on_all_ranks: every rank raises the error with the same words, so only one of them prints it.
    """

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class RunFailed(AllInOneError):
    """A launched run ended with an error. The message is what the user should read.

    Args:
        message: the run's own error message, or the end of its log.
        exit_code: exit status of the launcher.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
