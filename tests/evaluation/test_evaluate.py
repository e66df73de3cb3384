"""Evaluation: no drop path between two steps, and the score over tasks."""

from __future__ import annotations

import math

import torch

from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.loader import TaskData
from allinone_ds.evaluation.evaluate import WORST, evaluate_tasks, score
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


def test_an_evaluation_has_details_and_the_images_with_the_lowest_scores() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    made = samples(WORST + 3)
    data = {
        name: TaskData(made, eval_transform(SIZE), task.collate, batch_size=4)  # type: ignore[arg-type]
        for name, task in model.tasks.items()
    }
    found = evaluate_tasks(model, data, torch.device("cpu"))
    assert {name: next(iter(part["per_class"])) for name, part in found.details.items()} == {
        "det": "ap50",
        "seg": "iou",
        "cls": "accuracy",
    }
    assert found.details["cls"]["per_class"]["images"] == [4, 4, 3] and "map_small" in found.tasks["det"]
    for name, part in found.details.items():
        scores = [image["score"] for image in part["worst"]]
        assert len(scores) == WORST and scores == sorted(scores), name
    task = model.tasks["cls"]
    with torch.no_grad():
        outputs = model("cls", task.collate([eval_transform(SIZE)(sample) for sample in made])["pixel_values"])
    everyone = sorted(
        (task.sample_score(p, s), s["index"])
        for p, s in zip(task.predict(outputs, [SIZE] * len(made)), made, strict=True)
    )
    assert [image["index"] for image in found.details["cls"]["worst"]] == [index for _, index in everyone[:WORST]]
    assert found.warnings == []
