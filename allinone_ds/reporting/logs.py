"""What a training log says of every task beside Trainer's own values: gathered in each step, read once a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.report import StepReport
from allinone_ds.data.schedule import Schedule
from allinone_ds.distributed import all_reduce
from allinone_ds.errors import DataError
from allinone_ds.reporting.meters import Means, Pace, shares


class TaskLogs:
    """Values by task, as means over the steps since the last log.

    loss/TASK, grad_norm/TASK/raw (norm of the task's averaged backbone gradient), grad_norm/TASK/scale (the factor it
    got), grad_norm/TASK/scaled and grad_norm/TASK/share (of the squared norm of the update); and epoch/TASK,
    broken_images (unreadable ones, all ranks, whole run) and what `Pace` measures. Of the last step that measured them:
    cosine/TASK/TASK and conflict_rate, the share of pairs of tasks whose backbone gradients point apart.

    Args:
        schedule: of the run.
        images: images of one step over all ranks, by task.
        device: where sums are kept.
        max_broken_images: how many of the whole run may be unreadable.

    Attributes:
        pace: where the time of the steps goes.
    """

    def __init__(
        self, schedule: Schedule, images: Mapping[str, int], device: torch.device, max_broken_images: int
    ) -> None:
        self.schedule = schedule
        self.device = device
        self.max_broken_images = max_broken_images
        self.pace = Pace(images, device)
        self._means = Means(device)
        self._watched: StepReport | None = None  # the last one with cosines
        self._broken: list[str] = []
        self._broken_total: int | None = None  # over all ranks and the whole run, as of the last log

    def add(self, report: StepReport) -> None:
        """One more step."""
        share = shares(report.norms, report.scales)
        values: dict[str, Tensor] = {}
        for task in self.schedule.tasks:
            values[f"loss/{task}"] = report.losses[task]
            values[f"grad_norm/{task}/raw"] = report.norms[task]
            values[f"grad_norm/{task}/scale"] = report.scales[task]
            values[f"grad_norm/{task}/scaled"] = report.norms[task] * report.scales[task]
            values[f"grad_norm/{task}/share"] = share[task]
        self._means.add(values)
        if report.gram is not None:
            self._watched = report

    def add_broken(self, messages: Sequence[str]) -> None:
        """Images of this rank that could not be read, one message each."""
        self._broken += messages

    def drain(self, step: int, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Values of the steps since the last call; then start anew. Every rank must call it.

        Args:
            step: optimizer steps of the run so far.
            history: what was logged before.

        Raises:
            DataError: too many images could not be read.
        """
        with self.pace.working():
            logs = self._means.drain()
        logs.update(self.pace.drain())
        logs.update({f"epoch/{task}": self.schedule.epoch(task, step) for task in self.schedule.tasks})
        logs["broken_images"] = self._count_broken(history)
        if self._watched is not None:
            logs.update({f"cosine/{a}/{b}": value for (a, b), value in self._watched.cosines().items()})
            logs["conflict_rate"] = self._watched.conflict_rate()
            self._watched = None
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What was gathered since the last log, of this rank."""
        watched = self._watched
        return {
            "means": self._means.state_dict(),
            "gram": None if watched is None else watched.gram,
            "gram_tasks": [] if watched is None else list(watched.tasks),
            "broken": list(self._broken),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._means.load_state_dict(state["means"])
        self._watched = None
        if state["gram"] is not None:  # cosines need nothing else of the report
            self._watched = StepReport({}, {}, {}, {}, tasks=tuple(state["gram_tasks"]), gram=state["gram"])
        self._broken = list(state["broken"])

    def _count_broken(self, history: Sequence[Mapping[str, Any]]) -> int:
        if self._broken_total is None:  # a resumed run goes on counting
            earlier = [entry["broken_images"] for entry in history if "broken_images" in entry]
            self._broken_total = int(earlier[-1]) if earlier else 0
        self._broken_total += int(all_reduce(torch.tensor(len(self._broken), device=self.device)))
        if self._broken_total > self.max_broken_images:
            found = "; ".join(self._broken[:3])
            raise DataError(
                f"{self._broken_total} images could not be read, max_broken_images allows "
                f"{self.max_broken_images}; on this rank since the last log: {found or 'none'}. "
                "`allinone-ds check CONFIG` lists all of them"
            )
        self._broken.clear()
        return self._broken_total
