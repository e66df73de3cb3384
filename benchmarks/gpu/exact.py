"""Part `exact`: every engine kind, precision and norm against the float64 reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from allinone_ds.distributed import leave
from allinone_ds.testing.cases import KERNELS, WEIGHTINGS, Case, all_cases
from benchmarks.gpu.part import Run, rows_of

PROCESSES = 12
"""That measure at a time on a GPU: each leaves it idle most of the time."""
NORMS = ("sketch", "delayed")
ACCUMULATED = "zero1 bf16 fp32-accumulation"
LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Largest difference of a weight that passes, relative to the largest change of a weight."""
MUON_LIMIT = 0.15
"""In 16 bit: Muon's iteration enlarges rounding, on CPUs to 0.08."""
TRIAL = ("zero0 fp32", "zero2 bf16", "zero3 fp32 offload", "zero2 fp32 joint backbone", "zero2 fp32 norm=features")


def is_variant(case: Case) -> bool:
    """Return whether a case is about more than its stage, precision and offload."""
    joint = case.joint_at or case.norm != "exact"
    return bool(case.zero or case.one_group or case.checkpointing or joint)


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per case and norm, most worth first, measured in several processes at a time."""
    count = run.pick(PROCESSES, 2)
    arguments = [run.device, str(run.folder), str(run.left() - 5)]
    yield from rows_of([(__name__, [*arguments, str(first), str(count)], {}) for first in range(count)])


def trials(run: Run) -> list[tuple[Case, str]]:
    """Return every (case, norm), most worth first."""
    cases = [case for case in all_cases() if not case.apart and "hpz" not in case.name]  # which need two ranks
    cases = [case for case in cases if run.on_gpu or case.name in TRIAL]
    compiled, rest = ([case for case in cases if (case.optimizer in KERNELS) == kind] for kind in (True, False))
    plain, variants = ([case for case in rest if is_variant(case) == kind] for kind in (False, True))
    local = [case for case in plain if case.stage and case.optimizer == "sgd"]
    local = [case for case in local if case.name != ACCUMULATED]  # which keeps no gradients on the rank
    found = [(case, "exact") for case in plain] + [(case, norm) for norm in NORMS for case in local]
    return [*found, *((case, case.norm) for case in variants + compiled)]


def measure_some(device: str, folder: str, seconds: str, first: str, count: str) -> None:
    """Print the rows of one process: of every `count`-th trial, beginning with `first`."""
    run = Run(device, Path(folder), float(seconds))
    run.join()
    torch.set_float32_matmul_precision("highest")
    mine = trials(run)[int(first) :: int(count)]
    for number, (case, norm) in enumerate(mine):
        if run.left() < 10:
            print(json.dumps({"case": f"{len(mine) - number} more cases, not run for lack of time"}), flush=True)
            break
        call = partial(tested, case, norm) if norm in NORMS else partial(exact, case)
        print(json.dumps(attempt(case, norm, call)), flush=True)
    leave()


def attempt(case: Case, norm: str, call: Callable[[], float]) -> dict[str, Any]:
    """Return the row of a case; an error is a row as well."""
    row: dict[str, Any] = {"case": case.name, "norm": norm, "limit": limit(case)}
    try:
        row["difference"] = call()
        row["passed"] = row["difference"] <= row["limit"]
    except Exception as error:
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return row


def limit(case: Case) -> float:
    """Return the largest difference that passes, relative to the largest change of a weight."""
    return MUON_LIMIT if "muon" in case.optimizer and case.rounds != "fp32" else LIMITS[case.rounds]


def exact(case: Case) -> float:
    """Return the largest difference from the reference, relative to the largest change of a weight."""
    from benchmarks.correctness.balanced_case import run_case

    return run_case(case, WEIGHTINGS["tbgc"], (1, 2, 4))["weights_relative"]


def tested(case: Case, norm: str) -> float:
    """Return what the start-up self-test finds on an engine of the case's kind."""
    from deepspeed.runtime import torch_autocast

    from allinone_ds import TaskBalancer
    from allinone_ds.balance.self_test import self_test

    engine = toy_engine(case)
    try:
        return self_test(engine, TaskBalancer, norm)
    finally:
        engine.destroy()
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed never resets it for the engine of the next case


def toy_engine(case: Case) -> Any:
    """Return an engine of the case's kind on the toy model."""
    import deepspeed

    from allinone_ds.testing import toy

    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=toy.rate(WEIGHTINGS["tbgc"]))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]


if __name__ == "__main__":
    measure_some(*sys.argv[1:])
