"""How fast ranks exchange gradients: all-reduce and reduce-scatter for a few seconds, and how far their clocks differ.

torchrun --nproc_per_node 8 -m allinone_ds.bandwidth              # or on every host of a cluster, with --nnodes
allinone-ds doctor --nproc 8                                      # does it on this machine
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

from allinone_ds.machine.findings import between_ranks

SIZES = (2**20, 2**24, 2**26)  # bytes of a message
SECONDS = 1.2  # for each size and operation


def measure(operation: Callable[[], Any], size: int, share: float) -> float:
    """Bus bandwidth in GB/s: the bytes that each rank must send, by time; the mean over as many calls as fit in.

    Args:
        operation: the collective, on `size` bytes.
        size: bytes of the message.
        share: of the message that a rank must send, such as 2 (R - 1) / R for an all-reduce.
    """
    operation()  # the first call sets connections up
    _wait()
    start, calls = time.perf_counter(), 0
    more = torch.ones(1)
    while True:
        operation()
        _wait()
        calls += 1
        # ranks must make equally many calls: rank 0's clock decides
        more.fill_(time.perf_counter() - start < SECONDS)
        message = more.cuda() if dist.get_backend() == "nccl" else more
        dist.broadcast(message, src=0)
        if not message.item():
            return share * size * calls / (time.perf_counter() - start) / 1e9


def run() -> dict[str, Any]:
    """Measure on all ranks of the default process group; the same result on every rank."""
    ranks = dist.get_world_size()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    result: dict[str, Any] = {"ranks": ranks, "backend": dist.get_backend(), "GB/s": {}}
    for size in SIZES:
        whole = torch.ones(size // 4 // ranks * ranks, device=device)
        part = torch.empty(whole.numel() // ranks, device=device)
        reduce_scatter = functools.partial(dist.reduce_scatter_tensor, part, whole)
        result["GB/s"][str(size)] = {
            "all_reduce": measure(functools.partial(_all_reduce, whole), size, 2 * (ranks - 1) / ranks),
            "reduce_scatter": measure(reduce_scatter, size, (ranks - 1) / ranks),
        }
    dist.barrier()
    clocks: list[float] = [0.0] * ranks
    dist.all_gather_object(clocks, time.time())
    result["clocks_differ_s"] = max(clocks) - min(clocks)
    return result


def _all_reduce(whole: torch.Tensor) -> None:
    dist.all_reduce(whole.fill_(1))  # sums would overflow


def _wait() -> None:
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()


def main() -> int:
    """Join the ranks, measure, print one line of JSON on rank 0, and between hosts the same in words."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    result = run()
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):  # else the doctor says it
            for finding in between_ranks(result):
                print(f"{finding.level:8}{finding.what:12}{finding.found}  {finding.advice}".rstrip(), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
