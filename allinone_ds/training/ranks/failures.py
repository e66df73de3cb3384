"""Record why each rank of a run failed, and find the failure that caused the others."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from allinone_ds.errors import AllInOneError

FAILURES = "ALLINONE_DS_FAILURES"
"""Environment variable: the folder that the ranks record their failures in."""
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket (closed|Timeout)|failed to recv|"
    r"remote process (has )?(exited|terminated)|NCCL.*(remote|peer|aborted)",
    re.IGNORECASE,
)
"""Errors of a rank that waited for a different rank, which had ended before."""


@dataclass
class Failure:
    """Why one rank ended.

    Attributes:
        rank: the rank.
        time: seconds since the epoch.
        message: the message of an error that was written for the user; else the traceback.
        exit_code: exit code that the error asks for; None: the error was not expected.
        lost: whether it is known only that a rank lost its connection to a rank that had ended before.
    """

    rank: int
    time: float
    message: str
    exit_code: int | None = None
    lost: bool = False


def announce_rank() -> None:
    """Record that this rank has started, so that a rank that is killed is missed."""
    if os.environ.get(FAILURES):
        _file(os.environ[FAILURES], _rank(), "started").touch()


def record_failure(error: BaseException | str) -> None:
    """Record why this rank ends, for the command that started it, and for torchrun.

    Args:
        error: the exception that is being handled, or the message of an error that ends the process elsewhere.
    """
    known = isinstance(error, AllInOneError | str)
    code = error.exit_code if isinstance(error, AllInOneError) else 1 if known else None
    text = str(error) if known else traceback.format_exc().rstrip()
    failure = Failure(_rank(), time.time(), text, code, not known and _LOST.search(str(error)) is not None)
    if os.environ.get(FAILURES):
        file = _file(os.environ[FAILURES], failure.rank, "json")
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(failure)))
        part.rename(file)
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints the first of them when it ends
        details = {"py_callstack": text, "timestamp": str(int(failure.time))}
        content = {"message": {"message": _last_line(text), "extraInfo": details}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))


def first_failure(folder: str | Path) -> Failure | None:
    """Return the failure that ended a run: the first one in time that is not the loss of a different rank.

    If every recorded failure is such a loss, a rank that started and recorded nothing was killed, and is returned.

    Args:
        folder: folder that `FAILURES` named.

    Returns:
        The failure; None if no rank recorded one.
    """
    failures = [Failure(**json.loads(file.read_text())) for file in Path(folder).glob("rank-*.json")]
    if not failures:
        return None
    failures.sort(key=lambda failure: failure.time)
    if causes := [failure for failure in failures if not failure.lost]:
        return causes[0]
    started = {int(file.stem.removeprefix("rank-")) for file in Path(folder).glob("rank-*.started")}
    if silent := sorted(started - {failure.rank for failure in failures}):
        noticed = failures[0]
        text = (
            f"rank {silent[0]} ended without an error of Python, and rank {noticed.rank} lost its connection to it "
            f"({_last_line(noticed.message)}). Something killed the process: often the system when memory runs out "
            "(see dmesg), or a crash in a library"
        )
        return Failure(silent[0], noticed.time, text, lost=True)
    return failures[0]


def _last_line(text: str) -> str:
    return text.rpartition("\n")[2]


def _file(folder: str, rank: int, suffix: str) -> Path:
    return Path(folder) / f"rank-{rank}.{suffix}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
