"""Evaluation of every task on all ranks: each sample once, and one score that decides which model is best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from allinone_ds.data.loading.ahead import to_device
from allinone_ds.data.loading.loader import TaskData, eval_loader
from allinone_ds.distributed import all_reduce, gather_objects, rank, world_size
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.evaluation.selection import main_value, score
from allinone_ds.evaluation.views import predict_batch
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
    metric = task.metric().to(device)
    worst: list[dict[str, Any]] = []
    counts = [0, 0]  # samples, unreadable ones
    loader = eval_loader(data.dataset, data.transform, data.collate, data.batch_size, rank(), world_size(), num_workers)
    for batch in loader:
        pixels = to_device(batch.batch["pixel_values"], device)
        predictions = predict_batch(model, task, pixels, batch.samples, data.test_time, around)
        if batch.count:
            metric.update(predictions, batch.samples)
            worst = _worst([*worst, *_scored(task, predictions, batch.samples)])
            if record is not None:
                record(batch.samples, predictions)
        counts = [counts[0] + batch.count, counts[1] + len(batch.broken)]
    values = {key: float(value) for key, value in metric.compute().items()}
    samples, broken = all_reduce(torch.tensor(counts, device=device)).tolist()
    worst = _worst([image for of_rank in gather_objects(worst) for image in of_rank])
    found = task.details(metric) | ({"worst": worst} if worst else {})
    values |= found.pop("metrics", {})
    if details is not None and found:
        details[name] = found
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
        data: task -> evaluation data.
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
    values = {
        name: evaluate_task(model, name, part, device, num_workers, around, None, details)
        for name, part in data.items()
    }
    main = {name: main_value(name, tasks[name], metrics) for name, metrics in values.items()}
    for name, value in main.items():
        if value > 1 and len(main) > 1:
            note = (
                f"the main metric '{tasks[name].main_metric}' adds more than 1 to the score and outweighs the other "
                "tasks when the best checkpoint is chosen; scale it to 0..1"
            )
            details.setdefault(name, {}).setdefault("notes", []).append(note)
    return Evaluation(values, score(list(main.values())) if main else None, details)
