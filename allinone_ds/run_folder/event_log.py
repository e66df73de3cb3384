"""The event log of a run: RUN/log.jsonl, one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from allinone_ds.run_folder.names import EVENTS_FILE

AnyCallback = TypeVar("AnyCallback", bound=TrainerCallback)


class RunCallback(TrainerCallback):
    """A Trainer callback with three additional events."""

    def on_checkpoint(self, folder: Path) -> None:
        """Add files to the checkpoint that is being written to `folder`. Called on rank 0."""

    def on_warning(self, step: int, message: str) -> None:
        """Report a problem that did not end the run. Called on rank 0."""

    def on_note(self, step: int, message: str) -> None:
        """Report a fact about the run that is no problem. Called on rank 0."""


def find_callback(callbacks: Sequence[TrainerCallback] | None, kind: type[AnyCallback]) -> AnyCallback | None:
    """Return the first callback of a class, None if there is none."""
    return next((callback for callback in callbacks or () if isinstance(callback, kind)), None)


class EventLog(RunCallback):
    """Appends events to RUN/log.jsonl: {"event": ..., "time": ..., "step": ..., ...}.

    Events are "begin", "log", "warning", "note", "end" (of training) and "stopped", the last event of a run that
    saved a checkpoint and ended because of a signal.

    Args:
        folder: folder of the run.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as run:
        ...     log = EventLog(run)
        ...     log.write("warning", step=3, message="one image cannot be read")
        ...     json.loads(log.path.read_text())["message"]
        'one image cannot be read'
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / EVENTS_FILE

    def write(self, event: str, **values: Any) -> None:
        """Append one event; values that are not finite become null."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # the last line of a run that was killed while it wrote
                        file.write(b"\n")
                text = json.dumps({"event": event, "time": round(time.time(), 3), **line}) + "\n"
                file.write(text.encode())
        except OSError as error:
            error.filename = str(self.path)  # which the system does not name when it is written
            raise

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write("begin", step=state.global_step, max_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write("log", step=state.global_step, **{k: v for k, v in (logs or {}).items() if k != "step"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write("end", step=state.global_step)

    def on_warning(self, step: int, message: str) -> None:
        self.write("warning", step=step, message=message)

    def on_note(self, step: int, message: str) -> None:
        self.write("note", step=step, message=message)
