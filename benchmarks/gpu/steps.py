"""Part `steps`: a ViT-L in bf16, three tasks per step: plain DeepSpeed and every norm, on ZeRO 1, 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.machine import datasheet_flops, product_flops
from benchmarks.gpu.part import Run
from benchmarks.gpu.vit import PLAIN, Vit, large

MODES = (PLAIN, "exact", "sketch", "delayed")


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per stage and mode, most worth first."""
    run.join()
    measured = product_flops(run)
    stated = datasheet_flops(torch.cuda.get_device_name()) if run.on_gpu else None
    for vits in comparisons(run):
        yield from compared(run, vits, measured, stated)


def comparisons(run: Run) -> Iterator[list[Vit]]:
    """Yield runs that are compared with the first of them."""
    size = run.pick((512, 32), (32, 2))  # side and batch

    def vits(stage: int, modes: Sequence[str] = MODES[:2], size: tuple[int, int] = size, **options: Any) -> list[Vit]:
        return [Vit(run, large(run), *size, stage, mode, **options) for mode in modes]

    yield vits(2, MODES)
    if run.on_gpu:
        yield vits(2, compiled=True)
        yield vits(3)
        yield vits(1)
        yield vits(2, zero={"overlap_comm": False})
        yield vits(2, size=(224, 128))
        yield vits(3, (PLAIN, "sketch", "delayed"))


def compared(run: Run, vits: list[Vit], measured: float, stated: float | None) -> Iterator[dict[str, Any]]:
    """Yield one row per run, with its time beside that of the last plain one.

    Args:
        run: of the benchmark.
        vits: the plain run comes first.
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
        run.time(vit.step, repeats=1, warm_up=1)
        run.peak()
        seconds = run.time(vit.step, repeats=repeats, warm_up=0)
        peak, planned = run.peak() - before, vit.planned()
        between = None if vit.mode == PLAIN else min(vit.milliseconds_between_tasks() for _ in range(2))
        flops = vit.flops()
    finally:
        vit.close()
    return {
        **what(vit), "seconds": seconds,
        "images_per_s": 3 * vit.batch / seconds, "flops_per_s": flops / seconds, "peak_gib": peak / 2**30,
        "planned_gib": sum(planned.values()) / 2**30, "between_ms": between,
    }  # fmt: skip
