"""The parts of the benchmark, and what a part is told about the run."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from allinone_ds.training.launcher import free_port

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One part: what it asks, the seconds after which it is ended, and whether nothing may run beside it."""

    question: str
    seconds: int
    alone: bool = True


PARTS = {
    "machine": Part("What is this machine, how fast does it copy and multiply?", 60),
    "exact": Part("Do all engines and norms reach the weights of the float64 reference?", 110, alone=False),
    "steps": Part("What do balanced steps of a ViT-L cost beside plain DeepSpeed, in time and memory?", 200),
    "waits": Part("Where does the host wait for the device?", 80, alone=False),
    "trace": Part("What does the device do in a step?", 80),
    "order": Part("Does CUDA's sanitizer find accesses without an order?", 90, alone=False),
    "offload": Part("What do steps cost with the optimizer in the host's memory?", 70),
    "saving": Part("What does a save cost, and does a resumed run go on as it was?", 90),
    "heads": Part("Does every head compute in bf16 as in float32, and does the demo train?", 110, alone=False),
    "ranks": Part("Are two processes on one device (gloo) exact?", 90, alone=False),
    "large": Part("Which backbones of 1 billion parameters and more fit?", 90),
    "loader": Part("How many images per second reach the device?", 60),
}
"""The parts by name, most worth first; each is the module `benchmarks.gpu.NAME` with a function `measure`."""


@dataclass
class Run:
    """What a part is told.

    Args:
        device: "cuda", or "cpu" for a trial with small sizes, which shows that nothing fails for a typo.
        folder: for what the part writes besides its rows.
        seconds: of the part; `left` counts from now.
    """

    device: str
    folder: Path
    seconds: float = 600.0
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Whether this is no trial."""
        return self.device == "cuda"

    def pick(self, gpu: T, cpu: T) -> T:
        """Return the size for the device."""
        return gpu if self.on_gpu else cpu

    def left(self) -> float:
        """Return the seconds until the part is ended."""
        return self.seconds - (time.monotonic() - self.began)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
        """Return the median seconds of a call."""
        taken = []
        for number in range(warm_up + repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            if number >= warm_up:
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def allocated(self) -> int:
        """Return the bytes that tensors hold on the device now; 0 in a trial."""
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def peak(self) -> int:
        """Return the largest number of bytes since the last call, and begin anew; 0 in a trial."""
        if not self.on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def join(self, backend: str | None = None) -> None:
        """Join the process group that the environment describes."""
        import deepspeed

        from allinone_ds.zero.kernels import spare_cpu_kernel

        if not self.on_gpu:
            spare_cpu_kernel()
            deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # slowly, but it computes
        deepspeed.init_distributed(backend)


def run_command(command: Sequence[str], seconds: float) -> tuple[int, str, str]:
    """Run a command; return its exit status, output and errors. After its time it is ended: status 124."""
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = job.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        end_tree(job.pid)
        output, errors = job.communicate()
        return 124, output, f"{errors}\nended after {seconds:.0f} s"
    return job.returncode, output, errors


def rows_of(processes: Sequence[tuple[str, Sequence[str], Mapping[str, str]]]) -> Iterator[dict[str, Any]]:
    """Run modules in processes at the same time; yield the rows that they print as JSON, as they come.

    Args:
        processes: (module, arguments, environment beside that of this process) of each.
    """
    read, write = os.pipe()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            env={**os.environ, "MASTER_PORT": str(free_port()), **environment}, stdout=write,
        )
        for module, arguments, environment in processes
    ]  # fmt: skip
    os.close(write)
    with open(read) as lines:
        for line in lines:
            if line.startswith("{"):
                yield json.loads(line)
    for number, job in enumerate(jobs):
        if job.wait():
            yield {"process": number, "error": f"ended with status {job.returncode}; see the log"}


def end_tree(pid: int) -> None:
    """End a process and all that it has started, in other sessions too: they would keep memory of the device."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        started = process.children(recursive=True)
        for one in [*started, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(started, timeout=10)
