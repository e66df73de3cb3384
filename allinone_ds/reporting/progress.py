"""Progress of a run as lines of text."""

from __future__ import annotations

import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from allinone_ds.reporting.text import clock, losses_line, metrics_line


class PrintProgress(TrainerCallback):
    """Callback that prints one line per log (step, time left, loss per task) and one line per evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            done = state.global_step - self.first
            left = (time.perf_counter() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            line = losses_line(logs, digits=3)
            print(f"step {state.global_step}/{state.max_steps}  {clock(left)} left  loss: {line}", flush=True)
        elif "eval_score" in logs:
            print(f"step {state.global_step}  {metrics_line(logs)}", flush=True)


class ProgressBar(ProgressCallback):
    """The bar of transformers without its copy of every log: hundreds of values for tens of tasks."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write nothing; `PrintProgress` prints one line."""
