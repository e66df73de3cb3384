"""Part `exact`: every engine kind, precision and norm against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allinone_ds.testing.cases import WEIGHTINGS, Case, all_cases
from benchmarks.gpu.part import Run

NORMS = ("sketch", "delayed")
LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Largest difference of a weight that passes, relative to the largest change of a weight."""
TRIAL = ("zero0 fp32", "zero2 bf16", "zero3 fp32 offload")


def chosen(run: Run) -> list[Case]:
    """Return the cases of one rank, most worth first: without variants, then with."""
    cases = [case for case in all_cases() if not case.apart and (run.on_gpu or case.name in TRIAL)]
    return sorted(cases, key=lambda case: bool(case.zero or case.one_group or case.checkpointing))


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per case and norm."""
    import torch

    run.join()
    torch.set_float32_matmul_precision("highest")
    for case in chosen(run):
        yield from attempt(case, "exact", lambda case=case: exact(case))
    for case in chosen(run):
        if case.stage and not (case.zero or case.one_group or case.checkpointing):
            for norm in NORMS:
                if case.name != "zero1 bf16 fp32-accumulation":  # keeps no gradients on the rank
                    yield from attempt(case, norm, lambda case=case, norm=norm: tested(case, norm))
    for case in chosen(run):
        if not (case.zero or case.one_group or case.checkpointing):
            yield from attempt(case, "joint", lambda case=case: joint(case))


def attempt(case: Case, norm: str, call: Any) -> Iterator[dict[str, Any]]:
    """Yield the row of a case; an error is a row as well."""
    row: dict[str, Any] = {"case": case.name, "norm": norm, "limit": LIMITS[case.dtype]}
    try:
        row["difference"] = call()
        row["passed"] = row["difference"] <= row["limit"]
    except Exception as error:
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    yield row


def exact(case: Case) -> float:
    """Return the largest difference from the reference, relative to the largest change of a weight."""
    from benchmarks.correctness.balanced_case import run_case

    return run_case(case, WEIGHTINGS["tbgc"], (1, 2, 4))["weights_relative"]


def tested(case: Case, norm: str) -> float:
    """Return what the start-up self-test finds on an engine of the case's kind."""
    from allinone_ds import TaskBalancer
    from allinone_ds.balance.self_test import self_test

    engine = toy_engine(case)
    try:
        return self_test(engine, TaskBalancer, norm)
    finally:
        engine.destroy()


def joint(case: Case) -> float:
    """Return the largest difference where all tasks of a step run in one joint block."""
    import torch
    import torch.distributed as dist

    from allinone_ds.testing import exactness, toy
    from allinone_ds.testing.reference import reference_run
    from allinone_ds.zero.params import whole_master
    from benchmarks.correctness.balanced_case import make_balancer

    engine, steps, weighting = toy_engine(case), 3, WEIGHTINGS["tbgc"]
    balancer = make_balancer(engine, weighting, "data")
    dtype = next(engine.module.parameters()).dtype
    reports = []
    for step in range(steps):
        with balancer.joint(toy.TASKS, micro_steps=2):
            for k in range(2):
                batches = {
                    task: toy.inputs(task, step, k, dist.get_rank()).to(engine.device, dtype) for task in toy.TASKS
                }
                balancer.backward({task: engine(task, x, k == 1) for task, x in batches.items()})
        reports.append(balancer.step())
    computed = torch.float64 if case.dtype == "fp32" else exactness.DTYPES[case.dtype]
    wanted = reference_run(weighting, steps, dict.fromkeys(toy.TASKS, 2), dist.get_world_size(), computed)
    weights = {name: whole_master(engine, p) for name, p in engine.module.named_parameters() if p.requires_grad}
    found = exactness.compare(weights, reports, wanted, toy.make_model())
    balancer.detach()
    engine.destroy()
    return found["weights_relative"]


def toy_engine(case: Case) -> Any:
    """Return an engine of the case's kind on the toy model."""
    import deepspeed
    import torch

    from allinone_ds.testing import toy

    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=toy.rate(WEIGHTINGS["tbgc"]))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]
