"""The time of one micro-batch of every task, for the planner of groups."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.distributed import all_reduce, world_size
from allinone_ds.zero.guard import EngineGuard


def measure_tasks(
    tasks: Sequence[str], combiner: Combiner, guard: EngineGuard, loss_of: Callable[[str], Tensor], repeats: int
) -> dict[str, float]:
    """Return task -> seconds of forward and backward: median of the repeats, mean over ranks. Collective.

    Args:
        tasks: names of all tasks.
        combiner: between steps; every gradient is dropped.
        guard: of the engine.
        loss_of: task -> loss of one micro-batch, from a forward of the engine.
        repeats: micro-batches per task after one to warm up.
    """
    adapter = combiner.adapter

    def seconds(task: str) -> float:
        combiner.begin(task)
        adapter.set_reduces(False)
        adapter.synchronize()
        start = time.perf_counter()
        loss = loss_of(task)
        with guard.allowed():
            adapter.backward(loss)
        adapter.synchronize()
        taken = time.perf_counter() - start
        combiner.drop()
        return taken

    medians = [statistics.median([seconds(task) for _ in range(repeats + 1)][1:]) for task in tasks]
    combiner.close()
    mean = all_reduce(torch.tensor(medians, dtype=torch.float64, device=adapter.compute_device)) / world_size()
    return dict(zip(tasks, mean.tolist(), strict=True))
