"""A run that is asked to stop: SIGTERM or SIGUSR1 on any rank ends the step, then it saves and exits."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any rank got SIGTERM or SIGUSR1, with a checkpoint of that step.

    Ranks compare notes at the end of every step with one CPU message of 8 bytes. Until `close` the two signals do
    nothing else, so a launcher may send them to all ranks, and more than once.

    Attributes:
        caught: name of the signal that ended training, on whichever rank; None while there was none.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._mine = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def listen(self) -> None:
        """Take the two signals over; must be called on every rank (collective)."""
        if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "gloo" and self._group is None:
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread() and not self._before:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: Any) -> None:
        self._mine = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(self._mine)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        if asked and state.global_step < state.max_steps:
            self.caught = signal.Signals(int(asked)).name
            control.should_save = True
            control.should_training_stop = True
