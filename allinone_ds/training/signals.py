"""What ranks tell each other at the end of a step: that one was asked to stop, that all have finished a checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from allinone_ds.distributed import all_reduce, cpu_group
from allinone_ds.run_folder.background_writer import BackgroundSaver

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any rank got SIGTERM or SIGUSR1, with a checkpoint of that step.

    Ranks compare notes at the end of every step with one CPU message of 16 bytes. Until `close` the two signals do
    nothing else, so a launcher may send them to all ranks, and more than once. The same message tells whether every
    rank has finished a checkpoint in the background, so that all of them take note of it in the same step.

    Attributes:
        caught: name of the signal that ended training, on whichever rank; None while there was none.
        saver: the run's, where it saves in the background.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.saver: BackgroundSaver | None = None
        self._mine = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def listen(self) -> None:
        """Take the two signals over; must be called on every rank (collective)."""
        self._group = cpu_group()
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
        notes = torch.tensor([self._mine, int(self.saver is not None and self.saver.working)])
        asked, working = all_reduce(notes, dist.ReduceOp.MAX, self._group).tolist()
        if asked and state.global_step < state.max_steps:
            self.caught = signal.Signals(asked).name
            control.should_save = True
            control.should_training_stop = True
        if self.saver is not None and not working:
            self.saver.finish()
