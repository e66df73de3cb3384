"""Part `ranks`: two processes on one device, which exchange through gloo, since NCCL refuses to share a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from allinone_ds.distributed import leave
from allinone_ds.testing.cases import WEIGHTINGS, all_cases
from allinone_ds.training.launcher import free_port
from benchmarks.gpu.exact import LIMITS
from benchmarks.gpu.part import Run, rows_of

NAMES = ("zero2 fp32", "zero3 fp32", "zero3 fp32", "zero3 fp32", "zero3 fp32 overlap=0 contiguous=1", "zero1 fp32",
         "zero2 bf16", "zero2 fp32 offload", "zero2 fp32 tasks apart")  # fmt: skip
"""ZeRO-3 several times: on one GPU it was exact in one run and off by a tenth of the update in another."""
PLAIN_STAGES = (2, 3, 3, 3)
"""Of DeepSpeed without a balancer: is a difference its own?"""


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine."""
    port = str(free_port())
    ranks = ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_PORT": port, "RANK": rank} for rank in "01")
    yield from rows_of([(__name__, [run.device, str(run.folder)], environment) for environment in ranks])


def rank(device: str, folder: str) -> None:
    """Train the cases; LOCAL_RANK is 0 on both ranks."""
    from benchmarks.correctness.balanced_case import run_case
    from benchmarks.correctness.plain_deepspeed import run_plain

    run = Run(device, Path(folder))
    run.join("gloo")
    cases = {case.name: case for case in all_cases()}

    def balanced(name: str) -> dict[str, float]:
        found = run_case(cases[name], WEIGHTINGS["tbgc"], (1, 2, 1))
        return {"difference": found["weights_relative"], "norms": found["norms"]}

    def plain(stage: int) -> dict[str, float]:
        return {"difference": run_plain(stage, "accumulation")}

    trials: list[tuple[str, float, Callable[[], dict[str, float]]]] = [
        *((name, LIMITS[cases[name].rounds], partial(balanced, name)) for name in NAMES[: run.pick(len(NAMES), 2)]),
        *((f"plain DeepSpeed, ZeRO-{stage}", LIMITS["fp32"], partial(plain, stage))
          for stage in PLAIN_STAGES[: run.pick(len(PLAIN_STAGES), 1)]),
    ]  # fmt: skip
    for name, limit, call in trials:
        row: dict[str, Any] = {"case": name, "limit": limit}
        try:
            row |= call()
            row["passed"] = row["difference"] <= limit
        except Exception as error:  # on both ranks, as where gloo lacks an operation
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        if os.environ["RANK"] == "0":
            print(json.dumps(row), flush=True)
    leave()


if __name__ == "__main__":
    rank(*sys.argv[1:])
