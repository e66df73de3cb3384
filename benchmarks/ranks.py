"""Starts a benchmark's ranks: on this host, or on two hosts joined by a slow link (network namespaces; needs root)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FIRST_HOST = "10.77.0.1"


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[list[str]]:
    """Two network namespaces joined by a link of `rate` (as tc writes it); yields their names."""
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


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def run_ranks(worker: Sequence[str], ranks: int, rate: str | None) -> None:
    """Run a script under torchrun to its end.

    Args:
        worker: the script and its arguments; with a rate `--rate=RATE` is added.
        ranks: how many in all.
        rate: of the link between two hosts with half the ranks each; None: one host.

    Raises:
        SystemExit, subprocess.CalledProcessError: a rank failed.
    """
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if not rate:
        subprocess.run([*run, "--standalone", f"--nproc_per_node={ranks}", *worker], check=True, env=environment)
        return
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "SHAPED_LINK": "1"}
    with two_hosts(rate) as names:
        jobs = []
        for number, name in enumerate(names):
            where = ["--nnodes=2", f"--node_rank={number}", f"--nproc_per_node={ranks // 2}",
                     f"--master_addr={FIRST_HOST}", "--master_port=29400"]  # fmt: skip
            command = ["ip", "netns", "exec", name, *run, *where, *worker, f"--rate={rate}"]
            jobs.append(subprocess.Popen(command, env=environment))
        if any([job.wait() for job in jobs]):
            raise SystemExit("a host failed")


def link_bytes() -> int:
    """Bytes that this host has sent over the link of `two_hosts`; 0 without one."""
    sent = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(sent.read_text()) if os.environ.get("SHAPED_LINK") else 0
