"""Every metric of every kind says rightly whether larger values are better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tasks.dense.tiny import KINDS as DENSE
from tests.tasks.dense.tiny import build, dense_samples
from tests.tasks.kinds import KINDS, kind_model, kind_samples
from tests.tiny import tiny_model


def plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)


def answers(sample: dict, right: bool, seed: int) -> dict[str, Any]:
    """Return the truth of a sample as a prediction of every kind, or one that is far from it."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    if "depth" in sample:
        edges, salient = plain(sample["edges"]) == 1, plain(sample["saliency"]) == 1
        found |= {
            "depth": plain(sample["depth"]).nan_to_num(1.0),
            "normals": plain(sample["normals"]).nan_to_num(0.5),
            "edges": edges.float(),
            "saliency": salient.float(),
        }
        if not right:
            found = {key: value.flip(-1).flip(-2) for key, value in found.items()}
            found |= {"depth": found["depth"] * 1.5, "edges": (1 - found["edges"]) * 0.9}
            found["normals"] = found["normals"].roll(1, 0)
        return found
    label, shift = int(sample["label"]), 0 if right else 7
    attributes = sample["attributes"].nan_to_num(0.0)
    return {
        "boxes": plain(sample["boxes"]) + shift,
        "labels": sample["labels"],
        "scores": torch.ones(1),
        "masks": plain(sample["masks"]).roll(shift, -1).bool(),
        "keypoints": plain(sample["keypoints"]) + shift,
        "point_scores": torch.ones(1, 3),
        "attributes": attributes if right else 1 - attributes,
        "value": sample["value"].nan_to_num(0.0) + 100 * shift * (1 if seed % 2 else -1),
        "embedding": F.one_hot(torch.tensor(label), 3).float() if right else torch.randn(3, generator=generator),
        "mask": plain(sample["mask"]) if right else (plain(sample["mask"]) + 1) % 3,
        "label": label if right else (label + 1) % 3,
    }


def found_by(task: Any, made: list[dict], right: bool) -> dict[str, float]:
    """Return the metrics of right or wrong answers, with those that only the details have."""
    metric = task.metric()
    predictions = [answers(sample, right, seed) for seed, sample in enumerate(made)]
    if task.kind == "attributes":
        predictions = [{**p, "scores": p["attributes"]} for p in predictions]
    metric.update(predictions, made)
    values = metric.compute()
    return {**values, **task.details(metric).get("metrics", {})}


TASKS = {
    **{kind: lambda kind=kind: (build(kind)[1], dense_samples()) for kind in DENSE},
    **{name: lambda name=name: (kind_model(name).tasks[name], kind_samples(7, kind=name)) for name in KINDS},
    **{name: lambda name=name: (tiny_model().tasks[name], kind_samples(7)) for name in ("det", "seg", "cls")},
}


@pytest.mark.parametrize("name", TASKS)
def test_the_truth_is_better_than_a_wrong_answer_in_every_metric(name: str) -> None:
    task, made = TASKS[name]()
    right, wrong = (found_by(task, made, answer) for answer in (True, False))
    known = [metric for metric in task.known_metrics() if metric in right and metric not in ("recall5", "recall10")]
    assert task.main_metric in known and all(task.better_is_greater(metric) is not None for metric in known)
    for metric in known:
        better = right[metric] > wrong[metric] if task.better_is_greater(metric) else right[metric] < wrong[metric]
        assert better, (metric, right[metric], wrong[metric])
    assert right[task.main_metric] > 0.98
