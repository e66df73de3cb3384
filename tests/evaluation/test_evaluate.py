"""Evaluation: no drop path between two steps, and the score over tasks."""

from __future__ import annotations

import math

import torch

from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.loader import TaskData
from allinone_ds.evaluation.evaluate import evaluate_tasks, score
from tests.tiny import SIZE, samples, tiny_model


def test_an_evaluation_between_two_steps_drops_nothing() -> None:
    model = tiny_model(drop_path_rate=0.5)
    task = model.tasks["cls"]
    data = TaskData(samples(4), eval_transform(SIZE), task.collate, batch_size=4)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    task.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.logits))
    for _ in range(2):
        model.train()
        evaluate_tasks(model, {"cls": data}, torch.device("cpu"))
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_a_task_without_a_value_counts_zero() -> None:
    assert score([0.5, -1.0, math.nan, 0.5]) == 0.25
