"""Names and values that a training log has for every task, in addition to those of Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.renaming import Names, by_new_name
from allinone_ds.balance.report import StepReport
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.distributed import all_reduce, cpu_group, gather_objects
from allinone_ds.errors import DataError
from allinone_ds.reporting.meters import LowShares, Means, Pace, update_shares

MOST_IN_MEMORY = 2000
"""Training logs that `trainer.state` holds; each takes 1 KB of every checkpoint."""


def thin_history(history: list[dict[str, Any]]) -> None:
    """Remove training logs from a history, in place, if it holds more than `MOST_IN_MEMORY`.

    The last one, a quarter to half of the others at similar distances, and every evaluation remain. RUN/log.jsonl keeps
    all.

    Args:
        history: `trainer.state.log_history`.

    Example:
        >>> history = [{"step": step, "loss": 1.0} for step in range(1, MOST_IN_MEMORY + 2)]
        >>> thin_history(history)
        >>> len(history), history[-1]["step"]
        (1001, 2001)
    """
    if len(history) <= MOST_IN_MEMORY or sum("loss" in entry for entry in history) <= MOST_IN_MEMORY:
        return
    distance, kept_step, kept = 2 * (history[-1]["step"] - history[0]["step"]) / MOST_IN_MEMORY, -math.inf, []
    for entry in history:
        if "loss" not in entry or entry is history[-1] or entry["step"] - kept_step >= distance:
            kept.append(entry)
            kept_step = entry["step"] if "loss" in entry else kept_step
    history[:] = kept


class TaskLogs:
    """Values of a training log. Trackers write NAME as train/NAME (`reporting/trackers.py`).

    Means over the steps since the last log that ran the task; a task that none of them ran has none of these values:
        loss/TASK               loss, mean over micro-steps and ranks
        grad_norm/TASK/raw      norm of the task's averaged backbone gradient, before scaling
        grad_norm/TASK/scale    factor of that gradient
        grad_norm/TASK/scaled   their product
        grad_norm/TASK/share    the task's share of the update, see `update_shares`
    Of the last step with a Gram matrix (`balancer.cosines_every`):
        cosine/TASK/TASK        cosine of two tasks' backbone gradients
        conflict_rate           fraction of the pairs of tasks whose cosine is negative
    At the time of the log:
        epoch/TASK              epochs of the task's data
        learning_rate/TASK      rate of the head of a task with a schedule of its own
        broken_images           unreadable images of the whole run, over all ranks; an image counts once
    and the values of `Pace`.

    Args:
        schedule: schedule of the run.
        images: task -> images of one step over all ranks.
        device: device of the sums.
        max_broken_images: number of unreadable images that the whole run may have.
        groups: task of a joint group -> the group, which is in the schedule instead.

    Attributes:
        pace: measures the time of the steps.
        warnings: problems that the last call of `drain` found, as texts for the user.

    Example:
        >>> values = {"det": torch.tensor(2.0)}
        >>> schedule = Schedule(seed=0, sizes={"det": 10}, batch={"det": (2, 1)}, world_size=1)
        >>> logs = TaskLogs(schedule, {"det": 2}, torch.device("cpu"), max_broken_images=0)
        >>> logs.add(StepReport(norms=values, scales=values, losses=values, whole_norms=values))
        >>> logs.drain(step=1)["grad_norm/det/scaled"]
        4.0
    """

    def __init__(
        self,
        schedule: Schedule,
        images: Mapping[str, int],
        device: torch.device,
        max_broken_images: int,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        self.schedule = schedule
        members = {name: [task for task, own in (groups or {}).items() if own == name] for name in schedule.tasks}
        self.tasks = {task: name for name, tasks in members.items() for task in tasks or [name]}  # -> in the schedule
        self.device = device
        self._since = 0  # the step of the last log
        self.max_broken_images = max_broken_images
        self.pace = Pace(images, device)
        self.warnings: list[str] = []
        self._means = Means(device)
        self._low = LowShares(tuple(self.tasks), device)
        self._gram_report: StepReport | None = None  # the last one with a Gram matrix
        self._broken: dict[str, str] = {}  # message by file, of this rank since the last log
        self._broken_files: set[str] = set()  # of all ranks and the whole run, as of the last log

    def add(self, report: StepReport) -> None:
        """Add the values of one step; a task without any label in it has none."""
        shares = update_shares(report.norms, report.scales)
        none = torch.full((), torch.nan, device=self.device)  # a tensor of a number would wait for the device
        self._low.add({task: shares.get(task, none) for task in self.tasks})
        values: dict[str, Tensor] = {}
        for task in self.tasks:
            norm, scale = report.norms.get(task, none), report.scales.get(task, none)
            numbers = (report.losses.get(task, none), norm, scale, norm * scale, shares.get(task, none))
            values.update(zip(_values_of(task), numbers, strict=True))
        self._means.add(values)
        if report.gram is not None:
            self._gram_report = report

    def add_broken(self, messages: Sequence[str]) -> None:
        """Add images of this rank that could not be read, one `path: reason` each."""
        self._broken.update({message.partition(": ")[0]: message for message in messages})

    def drain(self, step: int) -> dict[str, float]:
        """Return the values of the steps since the last call. Collective.

        Args:
            step: number of optimizer steps of the run so far.

        Raises:
            DataError: more than `max_broken_images` images could not be read.
        """
        with self.pace.working():
            logs = self._means.drain()
            self.warnings = self._low.drain(logs)
        absent = {task for task in self.tasks if self.schedule.sampling and not self._runs(task, self._since, step)}
        logs = {key: value for key, value in logs.items() if key.split("/")[1] not in absent}
        logs.update(self.pace.drain(lambda task, steps: self._runs(task, step - steps, step)))
        self._since = step
        logs.update({f"epoch/{task}": self.schedule.epoch(name, step) for task, name in self.tasks.items()})
        logs["broken_images"] = self._count_broken()
        if self._gram_report is not None:
            logs.update({f"cosine/{a}/{b}": value for (a, b), value in self._gram_report.cosines().items()})
            logs["conflict_rate"] = self._gram_report.conflict_rate()
            self._gram_report = None
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Return the values since the last log, of this rank."""
        report = self._gram_report
        return {
            "since": self._since,
            "means": self._means.state_dict(),
            "low_shares": self._low.state_dict(),
            "gram": None if report is None else report.gram,
            "gram_tasks": [] if report is None else list(report.tasks),
            "broken": list(self._broken.values()),
            "broken_files": sorted(self._broken_files),
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Names | None = None) -> None:
        """Continue from values that `state_dict` returned.

        Args:
            state: the values.
            names: {task in `state`: its name in this run, None where it starts fresh}, if tasks differ.
        """
        if names:
            state = self._of_tasks(state, names)
        self._since = state.get("since", 0)  # as the other defaults, for checkpoints of earlier releases
        self._means.load_state_dict(state["means"])
        if "low_shares" in state:  # not in checkpoints of earlier releases
            self._low.load_state_dict(state["low_shares"])
        self._gram_report = None
        if state["gram"] is not None:  # cosines need nothing else of the report
            self._gram_report = StepReport({}, {}, {}, {}, tasks=tuple(state["gram_tasks"]), gram=state["gram"])
        self._broken.clear()
        self.add_broken(state["broken"])
        self._broken_files = set(state.get("broken_files", ()))  # older checkpoints do not have it

    def _of_tasks(self, state: Mapping[str, Any], names: Names) -> dict[str, Any]:
        """Return a state with the values of this run's tasks under their names; new ones have none."""
        means, low = state["means"], state.get("low_shares", {"steps": {}, "warned": []})
        if means["sums"] is not None:
            columns = {}
            for column, value in enumerate(means["names"]):
                first, task, *rest = value.split("/")
                columns["/".join([first, names.get(task, task) or "", *rest])] = column
            wanted = [value for task in self.tasks for value in _values_of(task)]
            sums = means["sums"].new_zeros(2, len(wanted))
            for column, value in enumerate(wanted):
                if value in columns:
                    sums[:, column] = means["sums"][:, columns[value]]
            means = {"names": wanted, "sums": sums}
        steps = by_new_name(low["steps"], names)
        low = {"steps": steps, "warned": [names.get(t, t) for t in low["warned"] if names.get(t, t) in steps]}
        return {**state, "means": means, "low_shares": low, "gram": None, "gram_tasks": []}

    def _runs(self, task: str, first: int, end: int) -> int:
        """Return the number of steps from `first` to before `end` that run a task."""
        name = self.tasks[task]
        return self.schedule.runs(name, end) - self.schedule.runs(name, first)

    def _count_broken(self) -> int:
        if not int(all_reduce(torch.tensor(len(self._broken), device=self.device))):
            return len(self._broken_files)
        every = gather_objects(self._broken, cpu_group())
        new = {file: message for broken in every for file, message in broken.items() if file not in self._broken_files}
        self._broken.clear()
        self._broken_files |= new.keys()
        if new and len(self._broken_files) > self.max_broken_images:
            raise DataError(
                f"{len(self._broken_files)} images could not be read, max_broken_images allows "
                f"{self.max_broken_images}; since the last log: {'; '.join(list(new.values())[:3])}. "
                "`allinone-ds check CONFIG` lists all of them"
            )
        return len(self._broken_files)


def _values_of(task: str) -> list[str]:
    """Return the names of the means of a task."""
    return [f"loss/{task}", *(f"grad_norm/{task}/{what}" for what in ("raw", "scale", "scaled", "share"))]
