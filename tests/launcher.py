"""Runs functions of a worker script on several ranks; each becomes a test of its own.

A worker script has `check_*` functions that every rank calls; a check fails when it raises on any rank. One start of
the ranks runs all of them. The ranks of most scripts are forked (see `tests.rank_server`); the balancer's checks on 4
ranks run under torchrun, and whole runs under the real launchers (see `tests.tiny_run` and `tests/integration`).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from allinone_ds.testing.launcher import torchrun
from allinone_ds.training.launcher import free_port

ROOT = Path(__file__).parents[1]
_servers: list[subprocess.Popen[str]] = []


def run_ranks(
    script: Path, world: int, folder: Path, *arguments: str, timeout: int = 600, fork: bool = True
) -> dict[str, str]:
    """Run a script on CPU ranks, or where DS_ACCELERATOR=cuda is set on one GPU per rank, and return its result.

    Args:
        script: calls `run_checks`, or writes JSON to the path that is its first argument.
        world: number of ranks.
        folder: for the result and for what the ranks print.
        arguments: of the script, after the path of its result.
        timeout: seconds, after which the ranks are killed.
        fork: False starts the ranks through torchrun, as users do; it takes some 10 s more.

    Returns:
        What the script wrote: the name of each check -> "" or the traceback of the first rank that failed.

    Raises:
        RuntimeError: the script left no result; the message has what the ranks printed.
    """
    out = folder / f"{script.stem}-{world}.json"
    if not fork:
        variables = {"PYTHONPATH": str(ROOT)}
        done = torchrun(
            [str(script), str(out), *arguments],
            world,
            environment=variables,
            folder=ROOT,
            capture=True,
            timeout=timeout,
        )
        if not out.exists():
            raise RuntimeError(f"{script.name} on {world} ranks left no result:\n{(done.stdout + done.stderr)[-9000:]}")
        return json.loads(out.read_text())
    log = folder / f"{script.stem}-{world}.log"
    environment = {"DS_ACCELERATOR": "cpu", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    environment["LOCAL_SIZE"] = str(world)  # else DeepSpeed starts `numactl` to count devices before each reduction
    request = {"script": str(script), "arguments": [str(out), *arguments], "world": world, "folder": str(ROOT),
               "environment": environment, "log": str(log), "timeout": timeout}  # fmt: skip
    statuses = _ask(request)
    if not out.exists():
        said = log.read_text(errors="replace")[-9000:] if log.exists() else ""
        raise RuntimeError(f"{script.name} on {world} ranks left no result, exit statuses {statuses}:\n{said}")
    return json.loads(out.read_text())


def _ask(request: dict) -> list[int]:
    """Hand a request to the rank server, started where none runs; return the exit statuses of the ranks."""
    if not _servers or _servers[-1].poll() is not None:
        environment = {"DS_ACCELERATOR": "cpu", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.rank_server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _servers.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, bufsize=1, **pipes))
        atexit.register(_servers[-1].communicate)  # closes its input and waits for it
    server = _servers[-1]
    server.stdin.write(json.dumps(request) + "\n")
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"the rank server ended with status {server.wait()}; its output is above")
    return json.loads(answer)["statuses"]


def join_ranks() -> None:
    """Join the process group of the ranks, without compiling a kernel that only CPU inference calls."""
    import deepspeed

    from allinone_ds.zero.kernels import spare_cpu_kernel

    if deepspeed.accelerator.get_accelerator().device_name() != "cuda":  # the CPU, or a fake device on it
        spare_cpu_kernel()
    deepspeed.init_distributed()


def run_checks(checks: dict[str, Callable[[], None]], out: str) -> None:
    """Call all checks in order on each rank, gather what each raised, and write it on rank 0. Collective.

    A check that raises on one rank alone leaves the others in a collective that it never joins. The gathering has a
    group of its own, so the two never meet: it gives up after two minutes and the rank ends with what it raised.
    """
    import torch.distributed as dist

    join_ranks()
    gathering = dist.new_group(backend="gloo", timeout=timedelta(minutes=2))
    results = {}
    for name, check in checks.items():
        try:
            check()
            problem = ""
        except Exception:
            problem = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        every: list[str] = [""] * dist.get_world_size()
        try:
            dist.all_gather_object(every, problem, group=gathering)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: a rank did not come out of it. {problem or 'This rank passed.'}") from error
        results[name] = next((p for p in every if p), "")
        gc.collect()
        gc.freeze()  # modules that the check imported; see `rank_server.import_libraries`
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
