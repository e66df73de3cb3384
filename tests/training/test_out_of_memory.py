"""Errors about memory name the settings to change."""

from __future__ import annotations

import torch

from allinone_ds.training.watch.out_of_memory import out_of_memory


def test_out_of_memory_names_what_to_change() -> None:
    said = str(
        out_of_memory(torch.OutOfMemoryError("CUDA out of memory.\nmore"), "step 7", "tasks.det", (2, 3, 64, 96), 3)
    )
    for word in ("rank 3", "step 7", "2 images of 64 x 96", "tasks.det.batch_size", "tasks.det.image_size"):
        assert word in said
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "", "d", (1, 3, 8, 8), 0)
    assert out_of_memory(RuntimeError("shapes differ"), "", "d", (1, 3, 8, 8), 0) is None
