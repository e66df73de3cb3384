"""Part `steps`: a ViT-L in bf16, three tasks per step: plain DeepSpeed and every norm, on ZeRO 1, 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.machine import datasheet_flops, product_flops
from benchmarks.gpu.part import Run
from benchmarks.gpu.vit import PLAIN, Vit, large

MODES = (PLAIN, "exact", "sketch", "delayed")


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per size, stage and mode."""
    run.join()
    measured = product_flops(run)
    stated = datasheet_flops(torch.cuda.get_device_name()) if run.on_gpu else None
    for side, batch in run.pick(((512, 16), (224, 64)), ((32, 2),)):
        for stage in run.pick((2, 3, 1), (2,)):
            plain: float | None = None
            for mode in MODES:
                if stage == 1 and mode in ("sketch", "delayed"):
                    continue  # BF16_Optimizer keeps no gradients on the rank
                row: dict[str, Any] = {"side": side, "batch": batch, "stage": stage, "mode": mode}
                try:
                    row = timed(Vit(run, large(run), side, batch, stage, mode), run)
                except Exception as error:  # what was measured before, and the other modes, stay worth having
                    yield {**row, "error": f"{type(error).__name__}: {error}"[:500]}
                    continue
                plain = row["seconds"] if mode == PLAIN else plain
                row |= {"ratio": row["seconds"] / plain if plain else None,
                        "utilisation": row["flops_per_s"] / stated if stated else None,
                        "of_matmul": row["flops_per_s"] / measured}  # fmt: skip
                yield row


def timed(vit: Vit, run: Run, repeats: int = 5) -> dict[str, Any]:
    """Return time and memory of a ViT's steps."""
    before = run.allocated()
    vit.open()
    try:
        run.time(vit.step, repeats=1, warm_up=2)
        run.peak()
        seconds = run.time(vit.step, repeats=repeats, warm_up=1)
        peak, planned = run.peak() - before, vit.planned()
        between = None if vit.mode == PLAIN else min(vit.milliseconds_between_tasks() for _ in range(3))
        flops = vit.flops()
    finally:
        vit.close()
    return {
        "side": vit.side, "batch": vit.batch, "stage": vit.stage, "mode": vit.mode, "seconds": seconds,
        "images_per_s": 3 * vit.batch / seconds, "flops_per_s": flops / seconds, "peak_gib": peak / 2**30,
        "planned_gib": sum(planned.values()) / 2**30, "between_ms": between,
    }  # fmt: skip
