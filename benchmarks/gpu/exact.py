"""Part `exact`: every engine kind, precision and norm against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allinone_ds.testing.cases import WEIGHTINGS, Case, all_cases
from benchmarks.gpu.part import Run

NORMS = ("sketch", "delayed")
LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Largest difference of a weight that passes, relative to the largest change of a weight."""
TRIAL = ("zero0 fp32", "zero2 bf16", "zero3 fp32 offload", "zero2 fp32 joint backbone", "zero2 fp32 norm=features")


def is_variant(case: Case) -> bool:
    """Return whether a case is about more than its stage, precision and offload."""
    joint = case.joint_at or case.norm != "exact"
    return bool(case.zero or case.one_group or case.checkpointing or joint)


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per case and norm, most worth first; as many variants as there is time for."""
    import torch

    run.join()
    torch.set_float32_matmul_precision("highest")
    cases = [case for case in all_cases() if not case.apart and (run.on_gpu or case.name in TRIAL)]
    plain, variants = ([case for case in cases if is_variant(case) == kind] for kind in (False, True))
    for case in plain:
        yield from attempt(case, "exact", lambda case=case: exact(case))
    for case in plain:
        if case.stage and case.name != "zero1 bf16 fp32-accumulation":  # which keeps no gradients on the rank
            for norm in NORMS:
                yield from attempt(case, norm, lambda case=case, norm=norm: tested(case, norm))
    for number, case in enumerate(variants):
        if run.left() < 10:
            yield {"case": f"{len(variants) - number} more cases, not run for lack of time"}
            return
        yield from attempt(case, case.norm, lambda case=case: exact(case))


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


def toy_engine(case: Case) -> Any:
    """Return an engine of the case's kind on the toy model."""
    import deepspeed
    import torch

    from allinone_ds.testing import toy

    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=toy.rate(WEIGHTINGS["tbgc"]))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]
