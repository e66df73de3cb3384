"""What a look at a machine found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    level: Literal["ok", "warning", "error"] = "ok"
    advice: str = ""


def between_ranks(result: dict[str, Any]) -> list[Finding]:
    """What `allinone_ds.bandwidth` measured, in words."""
    found = []
    for size, speeds in result["GB/s"].items():
        words = ", ".join(f"{name.replace('_', '-')} {speed:.2f} GB/s" for name, speed in speeds.items())
        found.append(Finding(f"{int(size) // 2**20} MiB", f"{words} ({result['ranks']} ranks, {result['backend']})"))
    speed = list(result["GB/s"].values())[-1]["all_reduce"]
    seconds = 2 * (result["ranks"] - 1) / result["ranks"] * 4 * 300e6 / 1e9 / speed
    slow = speed < 5 and result["backend"] == "nccl"
    advice = (
        "slow for GPUs of one machine: look at `nvidia-smi topo -m` and NCCL_DEBUG=INFO; bf16, ZeRO-2 and more "
        "micro_steps a step send less"
    )
    words = f"an all-reduce of those of 300M parameters in fp32 takes about {seconds:.1f} s"
    found.append(Finding("gradients", words, "warning" if slow else "ok", advice if slow else ""))
    apart = result["clocks_differ_s"]
    if apart > 1:
        advice = "let NTP set them: the hosts' logs cannot be laid beside each other"
        found.append(Finding("clocks", f"of the ranks are {apart:.1f} s apart", "warning", advice))
    return found
