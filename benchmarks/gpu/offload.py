"""Part `offload`: steps with the optimizer in the host's memory, plain and balanced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.machine import datasheet_flops, product_flops
from benchmarks.gpu.part import Run
from benchmarks.gpu.steps import MODES, compared
from benchmarks.gpu.vit import Vit, large


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per stage and mode."""
    run.join()
    measured = product_flops(run)
    stated = datasheet_flops(torch.cuda.get_device_name()) if run.on_gpu else None
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": run.on_gpu}}
    for stage in run.pick((2, 3), (2,)):
        size = run.pick((224, 32), (32, 2))
        vits = [Vit(run, large(run), *size, stage, mode, zero) for mode in MODES[:2]]
        yield from compared(run, vits, measured, stated)
