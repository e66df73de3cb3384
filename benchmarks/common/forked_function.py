"""Call a function on R ranks that are forked from one process, which has imported everything already."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from allinone_ds.training.launcher import free_port
from benchmarks.common.launch import FIRST_HOST


def call_on_ranks(
    namespaces: Sequence[str | None], rate: str | None, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Call a function on every rank and return what it returned on rank 0.

    Args:
        namespaces: the network namespace of each rank; None: that of this process.
        rate: of the link between two hosts; None: all ranks are on one host.
        function: called with `arguments` after the process group was initialized.
        arguments: of the function.

    Raises:
        SystemExit: a rank failed.
    """
    context = get_context("fork")
    results = context.Queue()
    port = free_port()
    jobs = [
        context.Process(target=_run_rank, args=(rank, namespaces, rate, port, results, function, *arguments))
        for rank in range(len(namespaces))
    ]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs) and results.empty():
        if any(job.exitcode for job in jobs):
            for job in jobs:
                job.terminate()
            raise SystemExit(f"a rank failed in {function.__name__}{arguments[1:]}")
        time.sleep(0.05)
    result = results.get()
    for job in jobs:
        job.join()
    return result


def _run_rank(rank: int, namespaces: Sequence[str | None], rate: str | None, port: int, results: Any,
              function: Callable[..., Any], *arguments: Any) -> None:  # fmt: skip
    name = namespaces[rank]
    if name is not None:
        with open(f"/run/netns/{name}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(namespaces)), "MASTER_PORT": str(port),
        "MASTER_ADDR": FIRST_HOST if rate else "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth0" if rate else "lo",
    }  # fmt: skip
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    result = function(*arguments)
    if rank == 0:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()
