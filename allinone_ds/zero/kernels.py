"""DeepSpeed's compiled kernels on the CPU."""

from __future__ import annotations

import deepspeed.ops


def spare_cpu_kernel() -> None:
    """Prevent `init_distributed` from compiling a kernel that only CPU inference uses.

    Call it before the process group is initialised, on the CPU only. Private field of DeepSpeed 0.19.8,
    `ops/__init__.py`.
    """
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
