"""Starts ranks through the real launcher, torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def torchrun(
    worker: Sequence[str],
    ranks: int,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    capture: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a worker on R ranks of this host, on the CPU, to its end.

    Args:
        worker: a script, or "-m" and a module, and its arguments.
        ranks: R.
        environment: variables beside those of this process.
        folder: to run in; None is the current one.
        capture: keep what the ranks print, in the result, instead of printing it.
        timeout: seconds; None waits without a limit.

    Returns:
        The finished process; its `returncode` is not 0 after a failure.

    Raises:
        subprocess.TimeoutExpired: the ranks took longer than `timeout`.
    """
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ, **(environment or {})}
    return subprocess.run(
        [*command, f"--nproc_per_node={ranks}", *worker],
        env=variables,
        cwd=folder,
        capture_output=capture,
        text=True,
        timeout=timeout,
        check=False,
    )
