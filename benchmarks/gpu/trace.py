"""Part `trace`: profiles of one step, plain and balanced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.part import Run
from benchmarks.gpu.vit import PHASES, PLAIN, Vit, large


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield rows per stage and mode, and write each profile (open it in https://ui.perfetto.dev)."""
    run.join()
    modes = (PLAIN, "exact", "delayed", "sketch")
    for stage, mode in run.pick((*((2, mode) for mode in modes), (3, "exact"), (3, PLAIN)), ((2, "exact"),)):
        vit = Vit(run, large(run), run.pick(512, 32), run.pick(32, 2), stage, mode)
        vit.open()
        for _ in range(3):
            vit.step()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * run.on_gpu
        with profile(activities=activities) as profiler:
            vit.step()
            run.synchronize()
        file = run.folder / f"trace-zero{stage}-{mode}.json.gz"
        profiler.export_chrome_trace(str(file))
        kernels = [e for e in profiler.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in kernels if e.name not in PHASES]  # which span the kernels of a phase
        what = {"stage": stage, "mode": mode}
        yield {**what, "file": file.name, "kernels": len(kernels), **busy(kernels)}
        for event in sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)[: run.pick(12, 1)]:
            yield {**what, "kernel": event.key[:90], "calls": event.count,
                   "ms": event.self_device_time_total / 1000}  # fmt: skip
        vit.close()


def busy(events: Iterable[Any]) -> dict[str, float]:
    """Return from the first kernel to the last: milliseconds, those in which a kernel runs, and the longest gap."""
    ranges = sorted((e.time_range.start, e.time_range.end) for e in events)
    if not ranges:
        return {"ms": 0.0, "busy_ms": 0.0, "longest_gap_ms": 0.0}
    end, used, longest = ranges[0][0], 0.0, 0.0
    for first, last in ranges:
        longest = max(longest, first - end)
        used += max(0.0, last - max(first, end))
        end = max(end, last)
    return {"ms": (end - ranges[0][0]) / 1000, "busy_ms": used / 1000, "longest_gap_ms": longest / 1000}
