"""A signal saves a checkpoint and stops the run."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

from allinone_ds.training.watch.signals import StopOnSignal


def test_a_signal_saves_and_stops_unless_the_run_is_over() -> None:
    for step, expected in ((3, True), (4, False)):
        stop = StopOnSignal()
        before = signal.getsignal(signal.SIGUSR1)
        stop.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(None, SimpleNamespace(global_step=step, max_steps=4), control)
        stop.close()
        assert signal.getsignal(signal.SIGUSR1) is before
        assert control.should_save is control.should_training_stop is expected
        assert stop.caught == ("SIGUSR1" if expected else None)
