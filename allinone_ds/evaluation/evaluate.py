"""Evaluation of every task on all ranks: each sample once, and one score that decides which model is best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from allinone_ds.data.joint.batches import views_of
from allinone_ds.data.loading.ahead import to_device
from allinone_ds.data.loading.loader import EvalBatch, eval_loader
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.distributed import all_reduce, gather_objects, rank, world_size
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.evaluation.selection import main_value, score
from allinone_ds.evaluation.views import predict_batch, predict_group
from allinone_ds.tasks import Prediction, Sample, Task
from allinone_ds.tasks.details import Details

WORST = 8
"""Images with the lowest scores that an evaluation remembers per task."""


def tasks_of(model: Any) -> dict[str, Task]:
    """Return the tasks by name of an AllInOneModel, or of the DeepSpeed engine around it."""
    return dict(getattr(model, "module", model).tasks)


@torch.no_grad()
def evaluate_task(
    model: nn.Module,
    name: str,
    data: TaskData,
    device: torch.device,
    num_workers: int = 0,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
    record: Callable[[Sequence[Sample], Sequence[Prediction]], None] | None = None,
    details: dict[str, Details] | None = None,
) -> dict[str, float]:
    """Return the metrics of one task, the same on every rank. Collective.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it. Every rank runs the same number of forwards, as
            ZeRO-3 requires.
        name: the task.
        data: evaluation data; every sample is evaluated on exactly one rank.
        device: the model's device.
        num_workers: processes per rank that read images.
        around: returns a context for each forward, given the task's name; for example `TaskBalancer.evaluation`.
        record: is called with the samples and predictions of every batch of this rank.
        details: receives under `name` what was found for each class, and the images with the lowest scores.

    Returns:
        Metric -> value; and over all ranks `samples`, the number of samples evaluated, and `broken`, the number of
        unreadable ones, when there are any.
    """
    task = tasks_of(model)[name]
    found = _Found(task, device, record)
    for batch in _batches(data, num_workers):
        pixels = to_device(batch.batch["pixel_values"], device)
        predictions = predict_batch(model, task, pixels, batch.samples, data.test_time, around)
        found.add(predictions, batch.samples, len(batch.broken))
    return found.compute(details)


@torch.no_grad()
def evaluate_group(
    model: nn.Module,
    name: str,
    data: TaskData,
    device: torch.device,
    num_workers: int = 0,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
    details: dict[str, Details] | None = None,
) -> dict[str, dict[str, float]]:
    """Return task -> metrics of the tasks of a joint group, from one forward of the backbone per batch. Collective.

    Args:
        model, data, device, num_workers, around, details: as in `evaluate_task`.
        name: the group.
    """
    assert data.joint is not None
    tasks = {task: tasks_of(model)[task] for task in data.joint.tasks}
    found = {task: _Found(tasks[task], device) for task in tasks}
    for batch in _batches(data, num_workers):
        pixels = to_device(batch.batch["pixel_values"], device)
        predictions = predict_group(model, name, list(tasks.values()), pixels, batch.samples, data.joint, around)
        for task, of_task in predictions.items():
            rows, views = views_of(batch.samples, task)
            found[task].add([of_task[row] for row in rows], views, len(batch.broken))
    return {task: of_task.compute(details) for task, of_task in found.items()}


def _batches(data: TaskData, num_workers: int) -> Iterable[EvalBatch]:
    return eval_loader(data.dataset, data.transform, data.collate, data.batch_size, rank(), world_size(), num_workers)


class _Found:
    """What an evaluation has found for one task so far on this rank."""

    def __init__(self, task: Task, device: torch.device, record: Any = None) -> None:
        self.task, self.record = task, record
        self.metric = task.metric().to(device)
        self.worst: list[dict[str, Any]] = []
        self.device, self.counts = device, [0, 0]  # samples, unreadable ones

    def add(self, predictions: Sequence[Prediction], samples: Sequence[Sample], broken: int) -> None:
        """Add a batch: the predictions, the samples as they were read, and the number of unreadable ones."""
        if samples:
            self.metric.update(predictions, samples)
            self.worst = _worst([*self.worst, *_scored(self.task, predictions, samples)])
            if self.record is not None:
                self.record(samples, predictions)
        self.counts = [self.counts[0] + len(samples), self.counts[1] + broken]

    def compute(self, details: dict[str, Details] | None) -> dict[str, float]:
        """Return the metrics over all ranks, and add what was found for each class to `details`. Collective."""
        values = {key: float(value) for key, value in self.metric.compute().items()}
        samples, broken = all_reduce(torch.tensor(self.counts, device=self.device)).tolist()
        worst = _worst([image for of_rank in gather_objects(self.worst) for image in of_rank])
        found = self.task.details(self.metric) | ({"worst": worst} if worst else {})
        values |= found.pop("metrics", {})
        if details is not None and found:
            details[self.task.name] = found
        return {**values, "samples": samples, **({"broken": broken} if broken else {})}


def _scored(task: Task, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    for prediction, sample in zip(predictions, samples, strict=True):
        # a data set of the user's may not number its samples
        value = task.sample_score(prediction, sample) if "index" in sample else None
        if value is not None:
            yield {"index": sample["index"], "path": str(sample.get("path", "")), "score": value}


def _worst(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the images with the lowest scores, lowest first; the order of equal scores depends on no rank."""
    return sorted(found, key=lambda image: (image["score"], image["index"]))[:WORST]


def evaluate_tasks(
    model: nn.Module,
    data: Mapping[str, TaskData],
    device: torch.device,
    num_workers: int = 0,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
) -> Evaluation:
    """Return the metrics of all tasks and the score, the same on every rank. Collective.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it; left in evaluation mode.
        data: task or joint group -> evaluation data.
        device: the model's device.
        num_workers: processes per rank that read images.
        around: returns a context for each forward, given the task's name; for example `TaskBalancer.evaluation`.

    Example::

        model, config = load_run("runs/demo")
        data = open_test_data(config, {name: task.classes for name, task in tasks_of(model).items()})
        found = evaluate_tasks(model, data, torch.device("cpu"))
        found.tasks["detection"]["map50"], found.score
    """
    model.eval()
    tasks = tasks_of(model)
    details: dict[str, Details] = {}
    values: dict[str, dict[str, float]] = {}
    for name, part in data.items():
        if part.joint is None:
            values[name] = evaluate_task(model, name, part, device, num_workers, around, None, details)
        else:
            values |= evaluate_group(model, name, part, device, num_workers, around, details)
    main = {name: main_value(name, tasks[name], metrics) for name, metrics in values.items()}
    for name, value in main.items():
        if value > 1 and len(main) > 1:
            note = (
                f"the main metric '{tasks[name].main_metric}' adds more than 1 to the score and outweighs the other "
                "tasks when the best checkpoint is chosen; scale it to 0..1"
            )
            details.setdefault(name, {}).setdefault("notes", []).append(note)
    return Evaluation(values, score(list(main.values())) if main else None, details)
