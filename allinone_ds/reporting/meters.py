"""What is measured in every step and read once a log: nothing waits for the device until then."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from allinone_ds.distributed import all_reduce


class Means:
    """Means over the steps since the last log, kept as sums on the device; non-finite values are left out.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (2, names): sums, counts

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values: names to scalars. The names are the same in every step."""
        row = torch.stack(
            [torch.as_tensor(v, device=self.device).detach().reshape(()).double() for v in values.values()]
        )
        finite = torch.isfinite(row)
        step = torch.stack([torch.where(finite, row, 0.0), finite.double()])
        if self._sums is None:
            self._names, self._sums = list(values), step
        elif self._names != list(values):
            raise ValueError(f"this step reports {list(values)}, the steps before it {self._names}")
        else:
            self._sums += step

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last log, of this rank."""
        return {"names": list(self._names), "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums that `state_dict` gave."""
        self._names = list(state["names"])
        self._sums = None if state["sums"] is None else state["sums"].to(self.device)

    def drain(self) -> dict[str, float]:
        """Means by name, over steps and over all ranks; then start anew. Every rank must call it.

        A name that had no finite value is NaN.
        """
        if self._sums is None:
            return {}
        table, self._sums = self._sums, None
        sums, counts = all_reduce(table).tolist()
        return {n: s / c if c else float("nan") for n, s, c in zip(self._names, sums, counts, strict=True)}


class Pace:
    """Where the time of the steps since the last log went, by the host's clock; the device is never waited for.

    On a GPU the host runs ahead of the device and catches up when a log is drained, so time a log is right and time a
    single step would not be. Evaluation and saving are not in it.

    Args:
        images: images of one step over all ranks, by task.
        device: of this rank.
    """

    def __init__(self, images: Mapping[str, int], device: torch.device) -> None:
        self.images = dict(images)
        self.device = device
        self._seconds = {"wait": 0.0, "work": 0.0}
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the step's data is waited for; begins a step."""
        self._steps += 1
        yield from self._timed("wait")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time in which the step is computed, or its log read from the device."""
        yield from self._timed("work")

    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """Values of the slowest rank since the last call; then start anew. Every rank must call it.

        Returns:
            seconds/step, seconds/data_wait (part of it), images_per_second/TASK (over all ranks), and memory/peak_gib
            (allocated on the device, or on a CPU resident, since the process began).
        """
        if not self._steps:
            return {}
        wait, work = self._seconds["wait"], self._seconds["work"]
        worst = torch.tensor([wait + work, wait, _peak_gib(self.device)], dtype=torch.float64, device=self.device)
        seconds, wait, memory = all_reduce(worst, ReduceOp.MAX).tolist()
        steps, self._steps, self._seconds = self._steps, 0, {"wait": 0.0, "work": 0.0}
        return {
            "seconds/step": seconds / steps,
            "seconds/data_wait": wait / steps,
            **{f"images_per_second/{task}": count * steps / seconds for task, count in self.images.items()},
            "memory/peak_gib": memory,
        }


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def shares(norms: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each task's share in the sum of squared scaled backbone norms, on the device.

    Args:
        norms: raw norms by task, 0-dim.
        scales: the factors they got; a task that was left out has factor 0.

    Returns:
        0-dim tensors from 0 to 1 by task; NaN when no task moved the backbone.
    """
    squares = {task: torch.where(scales[task] > 0, norms[task] * scales[task], 0.0).square() for task in norms}
    total = torch.stack(list(squares.values())).sum()
    return {task: square / total for task, square in squares.items()}
