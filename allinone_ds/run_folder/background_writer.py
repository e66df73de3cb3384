"""Checkpoints that are written while training goes on: a copy is taken in the step, a thread does the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from allinone_ds.distributed import cpu_group
from allinone_ds.errors import RunError


class BackgroundSaver:
    """Takes copies of what a checkpoint holds, and finishes the checkpoint in a thread. One at a time.

    The copies are `torch.distributed.checkpoint`'s: real ones in host memory, whose buffers are kept for the next
    checkpoint, pinned where there is an accelerator. The thread has a process group of its own, so nothing that it
    sends can meet what a step sends.

    Every rank calls `start` and `finish` at the same places: `finish` raises what the thread raised, and whatever is
    made with `group` makes all ranks' threads raise or none.

    Attributes:
        group: the thread's gloo group; None on a single rank.
        taken: what `take` has copied, (path, content), for the thread to write.
    """

    def __init__(self) -> None:
        self.group: Any = cpu_group(apart=True)
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )
        self.taken: list[tuple[Path, Any]] = []
        self._step = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def take(self, content: Any, path: Path) -> None:
        """Copy the content of a file into `taken`."""
        self.taken.append((path, self._stager.stage(content)))

    @property
    def working(self) -> bool:
        """This rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, work: Callable[[], None]) -> None:
        """Run `work` in the thread; `finish` must have been called since the last time.

        Args:
            step: of the checkpoint.
            work: writes what was taken and publishes it.
        """
        self._step = step
        # a thread that hangs with another rank's must not keep this process from ending
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that was started is published; nothing to wait for is no error.

        Raises:
            RunError: it could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        error, self._error = self._error, None
        self.taken.clear()
        if isinstance(error, RunError):
            raise error
        if error is not None:
            raise RunError(
                f"the checkpoint of step {self._step} was not finished: {type(error).__name__}: {error}. Earlier ones "
                "are untouched; go on with --resume"
            ) from error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            # the step goes first where both want a core
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            work()
        except BaseException as error:
            self._error = error
