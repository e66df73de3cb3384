"""Part `ranks`: two processes on one device, which exchange through gloo, since NCCL refuses to share a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from allinone_ds.distributed import leave
from allinone_ds.testing.cases import WEIGHTINGS, all_cases
from allinone_ds.training.launcher import free_port
from benchmarks.gpu.part import Run, rows_of

NAMES = ("zero2 fp32", "zero3 fp32", "zero1 fp32", "zero2 bf16", "zero2 fp32 offload", "zero2 fp32 tasks apart")


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine."""
    port = str(free_port())
    ranks = ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_PORT": port, "RANK": rank} for rank in "01")
    yield from rows_of([(__name__, [run.device, str(run.folder)], environment) for environment in ranks])


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
