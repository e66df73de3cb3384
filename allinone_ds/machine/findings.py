"""The findings of `allinone-ds doctor` and their wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report of `allinone-ds doctor`."""

    what: str
    """What was checked."""
    found: str
    """What was found."""
    level: Literal["ok", "warning", "error"] = "ok"
    advice: str = ""
    """What to do; empty if nothing needs to be done."""


def bandwidth_findings(result: dict[str, Any]) -> list[Finding]:
    """Return the findings for the result of `machine.bandwidth.run`."""
    found = []
    for size, speeds in result["GB/s"].items():
        words = ", ".join(f"{name.replace('_', '-')} {speed:.2f} GB/s" for name, speed in speeds.items())
        found.append(Finding(f"{int(size) // 2**20} MiB", f"{words} ({result['ranks']} ranks, {result['backend']})"))
    speed = list(result["GB/s"].values())[-1]["all_reduce"]
    seconds = 2 * (result["ranks"] - 1) / result["ranks"] * 4 * 300e6 / 1e9 / speed
    slow = speed < 5 and result["backend"] == "nccl"
    advice = (
        "slow for GPUs of one machine: check `nvidia-smi topo -m` and NCCL_DEBUG=INFO; bf16, ZeRO-2 and more "
        "micro_steps per step reduce the traffic"
    )
    words = f"an all-reduce of the gradients of 300M parameters in fp32 takes about {seconds:.1f} s"
    found.append(Finding("gradients", words, "warning" if slow else "ok", advice if slow else ""))
    apart = result["clocks_differ_s"]
    if apart > 1:
        advice = "synchronize the clocks with NTP, so that the times in the logs of different hosts are comparable"
        found.append(Finding("clocks", f"the clocks of the ranks differ by {apart:.1f} s", "warning", advice))
    return found
