"""Stop training on a signal, and finish background checkpoints, in the same step on every rank."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from allinone_ds.distributed import all_reduce, cpu_group
from allinone_ds.run_folder.background_saver import BackgroundSaver

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Carrier(Protocol):
    """What `StopOnSignal` uses of a `TaskBalancer`."""

    @property
    def carried(self) -> tuple[int, ...] | None: ...
    def carry(self, numbers: Callable[[], Sequence[int]]) -> None: ...


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training after the first step that begins after any rank received SIGTERM or SIGUSR1.

    The signals travel with the message that the balancer sends at the beginning of each step, where there is one;
    otherwise the ranks exchange a CPU message of 16 bytes at the end of each step. Between `listen` and `close` the two
    signals have no other effect, so a launcher may send them to all ranks and repeatedly. The same message reports
    whether every rank has finished writing a checkpoint in the background, so that all ranks call `saver.finish` in
    the same step.

    Attributes:
        caught: name of the signal that ended training, received by any rank; None if there was none.
        saver: the BackgroundSaver of the run; None without `async_save`.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.saver: BackgroundSaver | None = None
        self._received = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._carrier: Carrier | None = None

    def listen(self) -> None:
        """Install the handlers of the two signals. Collective."""
        self._group = cpu_group()
        if threading.current_thread() is threading.main_thread() and not self._before:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def travel_with(self, carrier: Carrier) -> None:
        """Use the messages of a balancer from its next step on. Call it on every rank."""
        carrier.carry(self._message)
        self._carrier = carrier

    def _message(self) -> list[int]:
        return [self._received, int(self.saver is not None and self.saver.working)]

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        agreed: Sequence[int] | None = self._carrier.carried if self._carrier is not None else None
        if agreed is None:
            message = torch.tensor(self._message(), device="cpu")
            agreed = [int(number) for number in all_reduce(message, dist.ReduceOp.MAX, self._group)]
        received, working = agreed
        if received and state.global_step < state.max_steps:
            self.caught = signal.Signals(received).name
            control.should_save = True
            control.should_training_stop = True
        if self.saver is not None and not working:
            self.saver.finish()
