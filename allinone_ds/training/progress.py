"""Callbacks of a run: its files beside every checkpoint, its log as lines of JSON, its progress as lines of text."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from allinone_ds.training.config import ModelFacts, RunConfig, save_run_files
from allinone_ds.training.folder import EVENTS_FILE
from allinone_ds.training.saving import RunCallback
from allinone_ds.training.text import clock, metrics_line, task_losses


class RunFiles(RunCallback):
    """Saves the resolved configuration and what the model is made of beside every checkpoint.

    Args:
        config: the run.
        facts: what else is needed to build its model again.
    """

    def __init__(self, config: RunConfig, facts: ModelFacts) -> None:
        self.config = config
        self.facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.on_checkpoint(Path(args.output_dir))

    def on_checkpoint(self, folder: Path) -> None:
        save_run_files(self.config, self.facts, folder)


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


class PrintProgress(TrainerCallback):
    """Prints one line a log: step, time left, loss of every task; and one line an evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            done = state.global_step - self.first
            left = (time.perf_counter() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            losses = "  ".join(f"{name} {value:.3f}" for name, value in task_losses(logs).items())
            print(f"step {state.global_step}/{state.max_steps}  {clock(left)} left  loss: {losses}", flush=True)
        elif "eval_score" in logs:
            print(f"step {state.global_step}  {metrics_line(logs)}", flush=True)
