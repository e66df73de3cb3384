"""Launch the ranks of a benchmark on this host, or on two hosts (network namespaces) joined by a slow link."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from allinone_ds.testing.launcher import torchrun

ROOT = Path(__file__).parents[2]
"""Root of the checkout."""
FIRST_HOST = "10.77.0.1"
"""Address of the first of two hosts."""


def worker_environment() -> dict[str, str]:
    """Return the variables with which processes started by a benchmark find its modules."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def measure_on_ranks(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    *,
    rate: str | None = None,
    environment: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Any:
    """Run `python -m MODULE ARGUMENTS --worker=FILE` on R ranks; return what rank 0 wrote there (see `serve`).

    Args:
        module: name of the benchmark's module.
        arguments: its command line.
        ranks: R.
        rate: of the link between two hosts with R / 2 ranks each, as tc writes it; None: one host.
        environment: variables beside those of this process.
        quiet: print what the ranks print only if one fails.

    Raises:
        SystemExit: a rank failed.
    """
    variables = {**(environment or {}), **worker_environment()}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        worker = ["-m", module, *arguments, f"--worker={target}"]
        if rate:
            _run_on_two_hosts(worker, ranks, rate, variables)
        else:
            done = torchrun(worker, ranks, environment=variables, capture=quiet)
            if done.returncode:
                raise SystemExit(f"{module}: a rank failed\n{(done.stderr or '')[-4000:]}")
        return json.loads(target.read_text())


def serve(target: Path, measure: Callable[[], Any]) -> None:
    """Call `measure` on every rank and write what it returns on rank 0 to `target`, as JSON. Call on every rank."""
    import deepspeed
    import torch.distributed as dist

    from allinone_ds.zero.kernels import spare_cpu_kernel

    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        spare_cpu_kernel()
    deepspeed.init_distributed()
    result = measure()
    if dist.get_rank() == 0:
        target.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _run_on_two_hosts(worker: Sequence[str], ranks: int, rate: str, environment: Mapping[str, str]) -> None:
    interfaces = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "SHAPED_LINK": "1"}
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **environment, **interfaces}
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
    launcher += [f"--nproc_per_node={ranks // 2}", f"--master_addr={FIRST_HOST}", "--master_port=29400"]
    with two_hosts(rate) as names:
        jobs = [
            subprocess.Popen(["ip", "netns", "exec", name, *launcher, f"--node_rank={number}", *worker], env=variables)
            for number, name in enumerate(names)
        ]
        if any([job.wait() for job in jobs]):
            raise SystemExit("the ranks of a host failed")


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[list[str]]:
    """Create two network namespaces joined by a link of `rate` (as tc writes it) and yield their names. Needs root."""
    names = [f"shaped{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            shape = ["root", "tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def one_host() -> Iterator[str]:
    """Create a network namespace that only the benchmark uses and yield its name. Needs root."""
    name = f"alone{os.getpid()}"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
