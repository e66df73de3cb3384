"""Part `ranks`: two processes on one device, which exchange through gloo, since NCCL refuses to share a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from allinone_ds.distributed import leave
from allinone_ds.testing.cases import WEIGHTINGS, all_cases
from benchmarks.gpu.part import Run

NAMES = ("zero2 fp32", "zero3 fp32", "zero1 fp32", "zero2 bf16", "zero2 fp32 offload", "zero2 fp32 tasks apart")


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine."""
    from allinone_ds.training.launcher import free_port

    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "LOCAL_SIZE": "2"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.ranks", run.device, str(run.folder)]
    jobs = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for line in jobs[0].stdout or ():
        if line.startswith("{"):
            yield json.loads(line)
    for rank, job in enumerate(jobs):
        job.communicate()
        if job.returncode:
            yield {"rank": rank, "error": f"ended with status {job.returncode}; see the log"}


def rank(device: str, folder: str) -> None:
    """Train the cases; LOCAL_RANK is 0 on both ranks."""
    from pathlib import Path

    from benchmarks.correctness.balanced_case import run_case

    run = Run(device, Path(folder))
    run.join("gloo")
    cases = {case.name: case for case in all_cases()}
    for name in NAMES[: run.pick(len(NAMES), 2)]:
        row: dict[str, Any] = {"case": name}
        try:
            found = run_case(cases[name], WEIGHTINGS["tbgc"], (1, 2, 1))
            row |= {"difference": found["weights_relative"], "norms": found["norms"]}
        except Exception as error:  # on both ranks, as where gloo lacks an operation
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        if os.environ["RANK"] == "0":
            print(json.dumps(row), flush=True)
    leave()


if __name__ == "__main__":
    rank(*sys.argv[1:])
