"""Values measured in every step and read once per log, so that no step waits for the device."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from allinone_ds.distributed import all_reduce


class Means:
    """Means over the steps since the last log, kept as sums on the device. Non-finite values are left out.

    Args:
        device: device of the sums.

    Example:
        >>> means = Means(torch.device("cpu"))
        >>> for loss in (1.0, 3.0, float("nan")):
        ...     means.add({"loss/det": loss})
        >>> means.drain()
        {'loss/det': 2.0}
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (2, names): sums, counts

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values, name -> scalar. The names are the same in every step."""
        row = torch.stack(
            [torch.as_tensor(v, device=self.device).detach().reshape(()) for v in values.values()]
        ).double()
        finite = torch.isfinite(row)
        step = torch.stack([torch.where(finite, row, 0.0), finite.double()])
        if self._sums is None:
            self._names, self._sums = list(values), step
        elif self._names != list(values):
            raise ValueError(
                f"values {list(values)} differ from those of the steps before, {self._names}; add the same names"
            )
        else:
            self._sums += step

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log, of this rank."""
        return {"names": list(self._names), "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from sums that `state_dict` returned."""
        self._names = list(state["names"])
        self._sums = None if state["sums"] is None else state["sums"].to(self.device)

    def drain(self) -> dict[str, float]:
        """Return name -> mean over the steps since the last call and over all ranks. Collective.

        The mean of a name without a finite value is NaN.
        """
        if self._sums is None:
            return {}
        table, self._sums = self._sums, None
        sums, counts = all_reduce(table).tolist()
        return {n: s / c if c else float("nan") for n, s, c in zip(self._names, sums, counts, strict=True)}


class Pace:
    """Time of the steps since the last log, without evaluation and saving, measured by the host's clock.

    On a GPU the host runs ahead of the device and waits for it when a log is drained. The time between two logs is
    therefore exact, and the time of a single step would not be.

    Names of its values:
        images_per_second/TASK  images of the task over all ranks per second of training
        seconds/step            time of a step on the slowest rank
        seconds/data_wait       part of that time in which the step waited for data
        memory/peak_gib         largest memory of a rank: allocated on the GPU, or resident on a CPU

    Args:
        images: task -> images of one step over all ranks.
        device: this rank's device.

    Example:
        >>> pace = Pace({"det": 8}, torch.device("cpu"))
        >>> with pace.waiting():
        ...     batch = torch.zeros(8)
        >>> with pace.working():
        ...     loss = batch.sum()
        >>> sorted(pace.drain())
        ['images_per_second/det', 'memory/peak_gib', 'seconds/data_wait', 'seconds/step']
    """

    def __init__(self, images: Mapping[str, int], device: torch.device) -> None:
        self.images = dict(images)
        self.device = device
        self._seconds = {"wait": 0.0, "work": 0.0}
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time for which a step waits for its data; begins a step."""
        self._steps += 1
        yield from self._timed("wait")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measure the time in which a step is computed, or its log is read from the device."""
        yield from self._timed("work")

    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - start

    def drain(self, runs: Callable[[str, int], int] | None = None) -> dict[str, float]:
        """Return the values of the slowest rank since the last call; {} without a step. Collective.

        Args:
            runs: returns in how many of the last n steps a task ran, from its name and n; None: in all.

        Returns:
            seconds/step; seconds/data_wait, which is part of it; images_per_second/TASK over all ranks; and
            memory/peak_gib since the process began, the largest of all ranks: allocated on the GPU, or resident on a
            CPU.
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
            **{
                f"images_per_second/{task}": count * (steps if runs is None else runs(task, steps)) / seconds
                for task, count in self.images.items()
            },
            "memory/peak_gib": memory,
        }


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def update_shares(norms: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each task's share of the update: (norm * scale)^2, divided by the sum of these squares over all tasks.

    Args:
        norms: task -> norm of its backbone gradient before scaling, 0-dim.
        scales: task -> factor of the gradient, 0-dim; 0 for a task that was left out of the step.

    Returns:
        task -> 0-dim tensor, 0 to 1, on the norms' device; NaN when all squares are 0.

    Example:
        >>> norms = {"a": torch.tensor(3.0), "b": torch.tensor(40.0)}
        >>> shares = update_shares(norms, {"a": torch.tensor(1.0), "b": torch.tensor(0.1)})
        >>> {task: round(float(share), 2) for task, share in shares.items()}
        {'a': 0.36, 'b': 0.64}
    """
    squares = {task: torch.where(scales[task] > 0, norms[task] * scales[task], 0.0).square() for task in norms}
    if not squares:  # a step without any label
        return {}
    total = torch.stack(list(squares.values())).sum()
    return {task: square / total for task, square in squares.items()}


class LowShares:
    """Warns of tasks that hardly move the backbone: whose share of the update is small in many steps in a row.

    The limit is 1 % of the update, or with more than ten tasks a tenth of an equal share. Steps are counted on the
    device and read once per log. A step without any update does not count.

    Args:
        tasks: names of the T tasks.
        device: device of the counts.

    Example:
        >>> low = LowShares(["a", "b"], torch.device("cpu"))
        >>> for _ in range(LowShares.STEPS):
        ...     low.add({"a": torch.tensor(0.999), "b": torch.tensor(0.001)})
        >>> low.drain({"grad_norm/b/share": 0.001, "grad_norm/b/raw": 1e-5, "grad_norm/b/scale": 1.0})[0][:66]
        "task 'b' had less than 1 % of the update of the backbone in each o"
        >>> low.drain({})  # once per occurrence
        []
    """

    STEPS = 100

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self.tasks = list(tasks)
        self.limit = min(0.01, 0.1 / len(self.tasks))
        self._steps = torch.zeros(len(self.tasks), dtype=torch.long, device=device)
        self._warned: set[str] = set()

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """Add one step's shares, task -> 0-dim, as `update_shares` returned them."""
        row = torch.stack([shares[task].to(self._steps.device) for task in self.tasks])
        counted = torch.where(row < self.limit, self._steps + 1, 0)
        self._steps = torch.where(torch.isnan(row), self._steps, counted)

    def drain(self, logs: Mapping[str, float]) -> list[str]:
        """Return a warning for each task whose count has reached `STEPS` since it was last warned of.

        Args:
            logs: the means since the last log, for the numbers in the warning.
        """
        warnings = []
        for task, steps in zip(self.tasks, self._steps.tolist(), strict=True):
            if steps < self.STEPS:
                self._warned.discard(task)
            elif task not in self._warned:
                self._warned.add(task)
                share, norm, scale = (
                    logs.get(f"grad_norm/{task}/{what}", math.nan) for what in ("share", "raw", "scale")
                )
                warnings.append(
                    f"task '{task}' had less than {100 * self.limit:.2g} % of the update of the backbone in each of "
                    f"the last {steps} steps (since the last log: share {share:.1e}, norm of its gradient {norm:.1e} "
                    f"before scaling, factor {scale:.1e}): the backbone hardly learns from it. Its head may predict "
                    "one class only, its loss may be constant, or the weighting may give it no weight; see "
                    "'Imbalance' in docs/heads.md"
                )
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and which tasks were warned of."""
        return {"steps": dict(zip(self.tasks, self._steps.tolist(), strict=True)), "warned": sorted(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; tasks that it does not have start at 0."""
        counts = [int(state["steps"].get(task, 0)) for task in self.tasks]
        self._steps = torch.tensor(counts, dtype=torch.long, device=self._steps.device)
        self._warned = set(state["warned"])
