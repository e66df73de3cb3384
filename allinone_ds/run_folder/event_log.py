"""The log of a run as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from allinone_ds.run_folder.names import EVENTS_FILE


class RunCallback(TrainerCallback):
    """A callback that beside Trainer's events hears of two more."""

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is being written to `folder`; whatever is put there belongs to it. Called on rank 0."""

    def on_warning(self, step: int, message: str) -> None:
        """Something went wrong that the run got over. Called on rank 0."""


class EventLog(RunCallback):
    """Appends to RUN/log.jsonl: {"event": ..., "step": ..., ...}, one object a line.

    Events are "begin", "log", "warning", "end" (of training) and "stopped", the last event of a run that a signal ended
    after a checkpoint.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / EVENTS_FILE

    def write(self, event: str, **values: Any) -> None:
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a run that was killed while it wrote a line
                    file.write(b"\n")
            text = json.dumps({"event": event, "time": round(time.time(), 3), **line}) + "\n"
            file.write(text.encode())

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
