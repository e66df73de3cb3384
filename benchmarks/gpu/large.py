"""Part `large`: one step of backbones of a billion parameters and more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.part import Run
from benchmarks.gpu.steps import timed
from benchmarks.gpu.vit import Vit, tiny

BACKBONES = {
    "ViT-g, 1.1B": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 34, "num_attention_heads": 16},
    "3.2B": {"hidden_size": 2560, "num_hidden_layers": 41, "num_attention_heads": 20},
}
"""Sizes of DINOv2 by name."""


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per backbone and way."""
    run.join()
    for name, sizes in BACKBONES.items():
        backbone = run.pick({"config": {**sizes, "patch_size": 14, "image_size": 224}}, tiny())
        for stage, checkpointing, batch in ((2, False, 16), (3, True, 32)):
            batch = run.pick(batch, 2)
            vit = Vit(run, backbone, run.pick(224, 32), batch, stage, checkpointing=checkpointing)
            row: dict[str, Any] = {"backbone": name, "stage": stage, "checkpointing": checkpointing, "batch": batch}
            try:
                yield {**row, "fits": True, **timed(vit, run, repeats=2)}
            except torch.OutOfMemoryError as error:
                yield {
                    **row,
                    "fits": False,
                    "planned_gib": sum(vit.planned().values()) / 2**30,
                    "error": str(error)[:300],
                }
                return  # what is left of an engine that ran out of memory cannot be freed
        if not run.on_gpu:
            return
