"""Part `machine`: versions, copies between host and device, and the peak of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from allinone_ds.balance.arithmetic import square_norm
from benchmarks.common.machine import describe_machine
from benchmarks.gpu.part import Run

DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}
"""Dense bf16 operations per second by a part of the name (fp16 for V100); SXM where there are several."""


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield rows that describe the machine."""
    row = {"what": "machine", **describe_machine(), "cuda": torch.version.cuda}
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        row |= {"device_gib": round(properties.total_memory / 2**30, 1), "processors": properties.multi_processor_count,
                "capability": list(torch.cuda.get_device_capability()), "nccl": list(torch.cuda.nccl.version()),
                "datasheet_flops": datasheet_flops(torch.cuda.get_device_name())}  # fmt: skip
    yield row
    yield from copies(run)
    yield from products(run)
    yield {"what": "norm of a long gradient, relative difference from float64", "difference": norm_difference(run)}


def datasheet_flops(name: str) -> float | None:
    """Return the operations per second that the maker states for a device."""
    return next((flops for part, flops in DATASHEET.items() if part in name), None)


def copies(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the bytes per second of large copies."""
    elements = run.pick(2**28, 2**20)
    device, host = torch.empty(elements, device=run.device), torch.empty(elements)
    other = torch.empty_like(device)
    pairs = {"host to device, pageable": (device, host), "device to host, pageable": (host, device),
             "device to device": (other, device)}  # fmt: skip
    if run.on_gpu:
        pinned = host.pin_memory()
        pairs |= {"host to device, pinned": (device, pinned), "device to host, pinned": (pinned, device)}
    for what, (target, source) in pairs.items():
        seconds = run.time(lambda target=target, source=source: target.copy_(source, non_blocking=True))
        yield {"what": what, "gib_per_s": 4 * elements / seconds / 2**30}


def products(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the operations per second of square matrix products."""
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        yield {"what": f"matmul {'tf32' if tf32 else str(dtype).removeprefix('torch.')}",
               "flops": product_flops(run, dtype, tf32)}  # fmt: skip


def product_flops(run: Run, dtype: torch.dtype = torch.bfloat16, tf32: bool = False) -> float:
    """Return the operations per second of a large matrix product."""
    size = run.pick(8192, 256)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    a, b = (torch.randn(size, size, device=run.device, dtype=dtype) for _ in range(2))
    calls = run.pick(10, 1)
    seconds = run.time(lambda: [a @ b for _ in range(calls)]) / calls
    torch.set_float32_matmul_precision("highest")
    return 2 * size**3 / seconds


def norm_difference(run: Run) -> float:
    """Return how far the balancer's norm of a long vector is from one in float64."""
    values = torch.randn(run.pick(2**28, 2**20), device=run.device)
    wanted = values.double().square().sum()
    return abs(float(square_norm([values], values.device) / wanted) - 1) / 2
