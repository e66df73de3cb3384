"""Part `order`: CUDA's sanitizer watches balanced steps for accesses without an order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from allinone_ds.testing.cases import WEIGHTINGS, Case, all_cases
from benchmarks.gpu.part import Run

NAMES = (
    "zero0 fp32", "zero1 fp32 overlap=1 contiguous=1", "zero2 fp32 overlap=1 contiguous=1", "zero2 fp32 offload",
    "zero3 fp32 overlap=1 contiguous=1", "zero3 fp32 overlap=0 contiguous=1", "zero3 fp32 offload", "zero3 fp16",
)  # fmt: skip


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine."""
    run.join()
    cases = {case.name: case for case in all_cases()}
    for name in NAMES[: run.pick(len(NAMES), 2)]:
        yield {"case": name, **watched(run, cases[name])}


def watched(run: Run, case: Case) -> dict[str, Any]:
    """Train an engine and return the accesses that the sanitizer reports."""
    from benchmarks.correctness.balanced_case import run_case

    found: list[str] = []
    if run.on_gpu:
        _report_to(found)
    try:
        difference = run_case(case, WEIGHTINGS["tbgc"], (1, 2, 1))["weights_relative"]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500], "unordered": sorted(set(found))}
    return {"difference": difference, "unordered": sorted(set(found))}


def _report_to(found: list[str]) -> None:
    """Enable the sanitizer, and let it collect what it would raise, so that one finding does not hide the next."""
    from torch.cuda import _sanitizer

    handler = _sanitizer.cuda_sanitizer.dispatch.event_handler
    launch = type(handler)._handle_kernel_launch

    def collect(*arguments: Any) -> list[Any]:
        for error in launch(handler, *arguments):
            now, before = error.current_access, error.previous_access
            found.append(f"{now.operator.name} at {_place(now)} after {before.operator.name} at {_place(before)}")
        return []

    handler._handle_kernel_launch = collect
    if not _sanitizer.cuda_sanitizer.enabled:
        torch.cuda.init()
        _sanitizer.enable_cuda_sanitizer()


def _place(access: Any) -> str:
    """Return the innermost line of an access outside of torch."""
    for frame in reversed(access.stack_trace):
        if "/torch/" not in frame.filename and "/gpu/order.py" not in frame.filename:
            return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
    return "?"
