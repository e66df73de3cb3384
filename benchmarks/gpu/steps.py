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
    """Yield one row per size, stage and mode, and last those of compiled layers."""
    run.join()
    measured = product_flops(run)
    stated = datasheet_flops(torch.cuda.get_device_name()) if run.on_gpu else None
    for side, batch in run.pick(((512, 16), (224, 64)), ((32, 2),)):
        for stage in run.pick((2, 3, 1), (2,)):
            # BF16_Optimizer, which is stage 1, keeps no gradients on the rank
            vits = [Vit(run, large(run), side, batch, stage, mode) for mode in MODES[: 2 if stage == 1 else None]]
            if side == 512:
                zero = {"overlap_comm": False}
                vits += [Vit(run, large(run), side, batch, stage, mode, zero) for mode in MODES[:2]]
            yield from compared(run, vits, measured, stated)
    if run.on_gpu:
        vits = [Vit(run, large(run), 512, 16, 2, mode, compiled=True) for mode in MODES[:2]]
        yield from compared(run, vits, measured, stated)


def compared(run: Run, vits: list[Vit], measured: float, stated: float | None) -> Iterator[dict[str, Any]]:
    """Yield one row per run, with its time beside that of the last plain one.

    Args:
        run: of the benchmark.
        vits: a plain run comes before those that are compared with it.
        measured: operations per second of a matrix product.
        stated: those of the data sheet.
    """
    plain: float | None = None
    for vit in vits:
        try:
            row = timed(vit, run)
        except Exception as error:  # what was measured before, and the other modes, stay worth having
            yield {**what(vit), "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        plain = row["seconds"] if vit.mode == PLAIN else plain
        row |= {"ratio": row["seconds"] / plain if plain else None,
                "utilisation": row["flops_per_s"] / stated if stated else None,
                "of_matmul": row["flops_per_s"] / measured}  # fmt: skip
        yield row


def what(vit: Vit) -> dict[str, Any]:
    """Return what is measured, for a row."""
    row = {"side": vit.side, "batch": vit.batch, "stage": vit.stage, "mode": vit.mode, "compiled": vit.compiled}
    return {**row, "overlap": vit.engine_config()["zero_optimization"]["overlap_comm"]}


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
        **what(vit), "seconds": seconds,
        "images_per_s": 3 * vit.batch / seconds, "flops_per_s": flops / seconds, "peak_gib": peak / 2**30,
        "planned_gib": sum(planned.values()) / 2**30, "between_ms": between,
    }  # fmt: skip
