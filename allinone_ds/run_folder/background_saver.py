"""Write checkpoints while training continues: the step copies the content, a thread writes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from allinone_ds.distributed import cpu_group
from allinone_ds.errors import RunError


class BackgroundSaver:
    """Copies the content of a checkpoint to host memory and writes it in a thread, one checkpoint at a time.

    The copies are made by `torch.distributed.checkpoint`, whose host buffers are reused by the next checkpoint (from
    torch 2.14 on) and are pinned if there is an accelerator. The thread has its own process group, so its messages
    never mix with those of the training step.

    Construct it on every rank, and call `start` and `finish` at the same points on every rank. `finish` raises what
    the thread raised; errors that the thread exchanges over `group` are therefore raised on every rank.

    Attributes:
        group: gloo process group of the thread; None on a single rank.
        staged: (path, content) of every file that `stage` has copied, for the thread to write.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> saver = BackgroundSaver()
        >>> weights = torch.zeros(3)
        >>> with TemporaryDirectory() as folder:
        ...     saver.stage({"weights": weights}, Path(folder) / "weights.pt")
        ...     saver.start(1, lambda: [torch.save(content, path) for path, content in saver.staged])
        ...     weights += 1  # does not change the copy
        ...     saver.finish()
        ...     torch.load(Path(folder) / "weights.pt")["weights"].tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self) -> None:
        self.group: Any = cpu_group(apart="saver")
        self._stager = _new_stager()
        self.staged: list[tuple[Path, Any]] = []
        self._step = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def stage(self, content: Any, path: Path) -> None:
        """Copy the content of a file and append it to `staged`."""
        self.staged.append((path, self._stager.stage(content)))
        if Version(torch.__version__) < Version("2.14"):
            self._stager = _new_stager()  # that of torch 2.11 closes itself after one use

    @property
    def working(self) -> bool:
        """Whether the thread of this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, work: Callable[[], None]) -> None:
        """Run `work` in the thread. Call `finish` before the next `start`.

        Args:
            step: optimizer step of the checkpoint.
            work: writes and publishes what was staged.
        """
        self._step = step
        # daemon: a thread that waits for another rank must not keep this process from exiting
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that was started is published; return at once if there is none.

        Raises:
            RunError: the checkpoint could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        error, self._error = self._error, None
        self.staged.clear()
        if isinstance(error, RunError):
            raise error
        if error is not None:
            raise RunError(
                f"the checkpoint of step {self._step} was not finished: {type(error).__name__}: {error}. Earlier "
                "checkpoints are unchanged; resume with --resume"
            ) from error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            # lowest priority: if both need the same core, the training step gets it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            work()
        except BaseException as error:
            self._error = error


def _new_stager() -> DefaultStager:
    pinned = torch.cuda.is_available()
    options = StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
    )
    return DefaultStager(options)
