"""Measure the bandwidth of all-reduce and reduce-scatter between ranks, and how much their clocks differ.

torchrun --nproc_per_node 8 -m allinone_ds.bandwidth       # with --nnodes on every host of a cluster
allinone-ds doctor --nproc 8                               # runs it on this machine
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from allinone_ds.distributed import barrier, gather_objects, leave, rank, world_size
from allinone_ds.machine.findings import bandwidth_findings

SIZES = (2**20, 2**24, 2**26)
"""Bytes per message."""
SECONDS = 1.2
"""Duration of the measurement per size and operation."""


def bus_bandwidth(operation: Callable[[], Any], size: int, fraction: float) -> float:
    """Return the bus bandwidth of a collective in GB/s: bytes that each rank must send, divided by the mean time.

    Args:
        operation: runs the collective on a message of `size` bytes.
        size: bytes of the message.
        fraction: part of the message that a rank must send, such as 2 (R - 1) / R for an all-reduce.
    """
    operation()  # the first call establishes the connections
    _synchronize()
    start, calls = time.perf_counter(), 0
    more = torch.ones(1)
    while True:
        operation()
        _synchronize()
        calls += 1
        # all ranks must make the same number of calls: the clock of rank 0 decides
        more.fill_(time.perf_counter() - start < SECONDS)
        message = more.cuda() if dist.get_backend() == "nccl" else more
        dist.broadcast(message, src=0)
        if not message.item():
            return fraction * size * calls / (time.perf_counter() - start) / 1e9


def run() -> dict[str, Any]:
    """Measure on all ranks of the default process group. Collective.

    Returns:
        {"ranks", "backend", "GB/s": {bytes: {"all_reduce", "reduce_scatter"}}, "clocks_differ_s"}, on every rank.
    """
    ranks = world_size()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    result: dict[str, Any] = {"ranks": ranks, "backend": dist.get_backend(), "GB/s": {}}
    for size in SIZES:
        full = torch.ones(size // 4 // ranks * ranks, device=device)
        part = torch.empty(full.numel() // ranks, device=device)
        reduce_scatter = functools.partial(dist.reduce_scatter_tensor, part, full)
        result["GB/s"][str(size)] = {
            "all_reduce": bus_bandwidth(functools.partial(_all_reduce, full), size, 2 * (ranks - 1) / ranks),
            "reduce_scatter": bus_bandwidth(reduce_scatter, size, (ranks - 1) / ranks),
        }
    barrier()
    clocks = gather_objects(time.time())
    result["clocks_differ_s"] = max(clocks) - min(clocks)
    return result


def _all_reduce(full: torch.Tensor) -> None:
    dist.all_reduce(full.fill_(1))  # repeated sums would overflow


def _synchronize() -> None:
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()


def main() -> int:
    """Measure, and print one line of JSON on rank 0; with several hosts also the findings."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    result = run()
    if rank() == 0:
        print(json.dumps(result), flush=True)
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):  # on one host the doctor prints them
            for finding in bandwidth_findings(result):
                print(f"{finding.level:8}{finding.what:12}{finding.found}  {finding.advice}".rstrip(), flush=True)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
