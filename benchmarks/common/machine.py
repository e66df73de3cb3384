"""Description of the machine that a result was measured on, and counters of its network traffic."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def processor_name() -> str:
    """Return the model name of the processor, or its architecture where the system does not name it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe_machine() -> dict[str, Any]:
    """Return processor, accelerator, memory and versions, as they are written beside the figures of a result."""
    import torch

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "deepspeed", "transformers")},
    }


def sent_bytes() -> int:
    """Return the bytes sent by all devices of this process's network namespace since it was created."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def link_bytes() -> int:
    """Return the bytes that this host has sent over the link of `launch.two_hosts`; 0 on a single host."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if os.environ.get("SHAPED_LINK") else 0
