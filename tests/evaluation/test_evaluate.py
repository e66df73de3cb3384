"""Evaluation: no drop path between two steps, and the score over tasks."""

from __future__ import annotations

import math
from typing import Any

import torch

from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.evaluation.evaluate import WORST, evaluate_tasks, score
from allinone_ds.tasks.classification import ClassificationTask
from tests.tiny import CLASSES, SIZE, samples, tiny_model


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


class CountOnly:
    """A metric that knows nothing of classes."""

    higher_is_better = True

    def __init__(self) -> None:
        self.count = 0

    def to(self, device: torch.device) -> CountOnly:
        return self

    def update(self, predictions: list, samples: list) -> None:
        self.count += len(samples)

    def compute(self) -> dict[str, float]:
        return {"top1": float(self.count > 0)}


class OwnClassification(ClassificationTask):
    """A task that was written before there were details: its own metric, and predictions without scores."""

    def predict(self, outputs: Any, sizes: Any) -> list[dict[str, Any]]:
        return [{"label": int(label)} for label in outputs.logits.argmax(-1)]

    def metric(self) -> Any:
        return CountOnly()


def test_own_tasks_and_data_without_details_are_evaluated_as_before() -> None:
    model = tiny_model()
    model.tasks["cls"] = OwnClassification("cls", CLASSES, model.backbone.channels, 4, model.backbone.num_levels, SIZE)
    made = [{key: value for key, value in sample.items() if key != "index"} for sample in samples(3)]
    data = {
        name: TaskData(made, eval_transform(SIZE), model.tasks[name].collate, batch_size=4)  # type: ignore[arg-type]
        for name in ("cls", "seg")
    }
    found = evaluate_tasks(model, data, torch.device("cpu"))
    assert found.tasks["cls"] == {"top1": 1.0, "samples": 3} and "cls" not in found.details
    assert "worst" not in found.details["seg"] and found.details["seg"]["per_class"]


class PercentOnly(CountOnly):
    def compute(self) -> dict[str, float]:
        return {"top1": 45.0}


class PercentClassification(OwnClassification):
    def metric(self) -> Any:
        return PercentOnly()


def test_a_main_metric_that_outweighs_the_others_is_said() -> None:
    model = tiny_model()
    model.tasks["cls"] = PercentClassification(
        "cls", CLASSES, model.backbone.channels, 4, model.backbone.num_levels, SIZE
    )
    data = {
        name: TaskData(samples(3), eval_transform(SIZE), model.tasks[name].collate, batch_size=4)  # type: ignore[arg-type]
        for name in ("cls", "seg")
    }
    (warning,) = evaluate_tasks(model, data, torch.device("cpu")).warnings
    assert warning.startswith("cls: the main metric 'top1' adds more than 1 to the score")
    assert evaluate_tasks(model, {"cls": data["cls"]}, torch.device("cpu")).warnings == []
