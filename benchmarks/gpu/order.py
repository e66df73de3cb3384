"""Part `order`: CUDA's sanitizer watches balanced steps for accesses without an order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from allinone_ds.distributed import leave
from allinone_ds.testing.cases import WEIGHTINGS, Case, all_cases
from benchmarks.gpu.part import Run, rows_of

NAMES = (
    "zero0 fp32", "zero1 fp32 overlap=1 contiguous=1", "zero2 fp32 overlap=1 contiguous=1", "zero2 fp32 offload",
    "zero3 fp32 overlap=1 contiguous=1", "zero3 fp32 overlap=0 contiguous=1", "zero3 fp32 offload", "zero3 fp16",
)  # fmt: skip


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per engine, each measured in a process of its own."""
    names = NAMES[: run.pick(len(NAMES), 2)]
    yield from rows_of([(__name__, [run.device, str(run.folder), name], {}) for name in names])


def measure_one(device: str, folder: str, name: str) -> None:
    """Print the row of one engine."""
    run = Run(device, Path(folder))
    run.join()
    case = next(case for case in all_cases() if case.name == name)
    print(json.dumps({"case": name, **watched(run, case)}), flush=True)
    leave()


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
    return {"difference": difference, "unordered": sorted(set(found)), "passed": not found}


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


if __name__ == "__main__":
    measure_one(*sys.argv[1:])
