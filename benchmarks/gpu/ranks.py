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
PLAIN = ((2, True), (3, True), (3, True), (3, True), (3, False))
"""ZeRO stage and overlap_comm of DeepSpeed without a balancer: is a difference its own?"""


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine."""
    port = str(free_port())
    ranks = ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_PORT": port, "RANK": rank} for rank in "01")
    yield from rows_of([(__name__, [run.device, str(run.folder)], environment) for environment in ranks])


def rank(device: str, folder: str) -> None:
    """Train the cases; LOCAL_RANK is 0 on both ranks."""
    from benchmarks.correctness.balanced_case import run_case

    run = Run(device, Path(folder))
    run.join("gloo")
    cases = {case.name: case for case in all_cases()}

    def balanced(name: str) -> dict[str, float]:
        found = run_case(cases[name], WEIGHTINGS["tbgc"], (1, 2, 1))
        return {"difference": found["weights_relative"], "norms": found["norms"]}

    trials: list[tuple[str, float, Callable[[], dict[str, float]]]] = [
        *((name, LIMITS[cases[name].rounds], partial(balanced, name)) for name in NAMES[: run.pick(len(NAMES), 2)]),
        *((f"plain DeepSpeed, one task, ZeRO-{stage}, overlap_comm={overlap}", LIMITS["fp32"],
           partial(plain, stage, overlap)) for stage, overlap in PLAIN[: run.pick(len(PLAIN), 2)]),
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


def plain(stage: int, overlap: bool) -> dict[str, float]:
    """Train one task without a balancer; return the distance from the same steps in float64. Call on every rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from allinone_ds.testing import toy
    from allinone_ds.testing.cases import STEPS, Case
    from allinone_ds.zero.params import whole_master

    config = Case("plain", stage).config()
    config["zero_optimization"]["overlap_comm"] = overlap
    model, reference, task = toy.make_model().float(), toy.make_model().double(), toy.TASKS[0]
    rate = 0.05
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=rate)
    other = torch.optim.SGD(toy.param_groups(reference), lr=rate)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    world = dist.get_world_size()
    for step in range(STEPS):
        engine.backward(engine(task, toy.inputs(task, step, 0, dist.get_rank()).float().to(engine.device), True))
        engine.step()
        other.zero_grad()
        for number in range(world):
            (reference(task, toy.inputs(task, step, 0, number), True) / world).backward()
        other.step()
    worst = largest = 0.0
    for (name, start), target in zip(toy.make_model().named_parameters(), reference.parameters(), strict=True):
        trained = whole_master(engine, engine.module.get_parameter(name))
        worst = max(worst, float((trained - target.detach()).abs().max()))
        largest = max(largest, float((start.detach() - target.detach()).abs().max()))
    engine.destroy()
    return {"difference": worst / largest}


if __name__ == "__main__":
    rank(*sys.argv[1:])
