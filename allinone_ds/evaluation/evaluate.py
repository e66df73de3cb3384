"""Evaluation of every task on all ranks: each sample once, and one number that decides which model is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from allinone_ds.data.loader import TaskData, eval_loader
from allinone_ds.evaluation.views import predict_batch
from allinone_ds.tasks import Prediction, Sample, Task


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, however nested; dtypes stay, heads decide what they compute in."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def tasks_of(model: Any) -> dict[str, Task]:
    """Tasks by name of an AllInOneModel, or of the DeepSpeed engine around it."""
    return dict(getattr(model, "module", model).tasks)


@torch.no_grad()
def evaluate_task(
    model: nn.Module,
    name: str,
    data: TaskData,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
    record: Callable[[Sequence[Sample], Sequence[Prediction]], None] | None = None,
) -> dict[str, float]:
    """Metrics of one task on its data, the same on every rank.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it. Every rank runs equally many forwards, as ZeRO-3
            needs.
        name: the task.
        data: what to evaluate on.
        device: where the model is.
        rank: of this process.
        world_size: number of ranks; every sample is counted on exactly one.
        num_workers: processes that read images.
        around: entered with the task's name around each forward, such as `TaskBalancer.evaluation`.
        record: gets the samples and predictions of every batch of this rank.

    Returns:
        Values by metric name, and over all ranks `samples`, the number of samples counted, and `broken`, that of
        unreadable ones when there are any.
    """
    task = tasks_of(model)[name]
    metric = task.metric().to(device)
    counted = torch.zeros(2, dtype=torch.long, device=device)  # samples, unreadable ones
    loader = eval_loader(data.dataset, data.transform, data.collate, data.batch_size, rank, world_size, num_workers)
    for batch in loader:
        pixels = to_device(batch.batch["pixel_values"], device)
        predictions = predict_batch(model, task, pixels, batch.samples, data.test_time, around)
        if batch.count:
            metric.update(predictions, batch.samples)
            if record is not None:
                record(batch.samples, predictions)
        counted += torch.tensor([batch.count, len(batch.broken)], device=device)
    if world_size > 1:
        torch.distributed.all_reduce(counted)
    values = {key: float(value) for key, value in metric.compute().items()}
    samples, broken = counted.tolist()
    return {**values, "samples": samples, **({"broken": broken} if broken else {})}


def evaluate_tasks(
    model: nn.Module,
    data: Mapping[str, TaskData],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefix: str = "eval",
    around: Callable[[str], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Metrics of all tasks, named PREFIX_TASK_METRIC, and PREFIX_score, the mean of the tasks' main metrics.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it; left in evaluation mode.
        data: what to evaluate on, by task.
        device: where the model is.
        rank: of this process.
        world_size: number of ranks.
        num_workers: processes that read images.
        prefix: of all names.
        around: entered with a task's name around each of its forwards, such as `TaskBalancer.evaluation`.
    """
    model.eval()
    tasks = tasks_of(model)
    metrics: dict[str, float] = {}
    main: list[float] = []
    for name, part in data.items():
        values = evaluate_task(model, name, part, device, rank, world_size, num_workers, around)
        metrics.update({f"{prefix}_{name}_{key}": value for key, value in values.items()})
        main.append(values[tasks[name].main_metric])
    if main:
        metrics[f"{prefix}_score"] = score(main)
    return metrics


def score(main: list[float]) -> float:
    """Mean of the tasks' main metrics; a task without a value (NaN, or torchmetrics' -1) counts 0."""
    return sum(0.0 if math.isnan(value) or value < 0 else value for value in main) / len(main)
