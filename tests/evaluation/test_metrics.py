"""Metrics keep their task through the flat names of logs, also where one task's name begins another's."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from allinone_ds.evaluation.metrics import (
    AVERAGED_PREFIX,
    MAX_LOGGED_CLASSES,
    Evaluation,
    flatten,
    labelled_metrics,
    nest,
)
from allinone_ds.reporting.text import metrics_line

VALUES = {
    "det": {"map50": 0.25, "map": 0.125, "samples": 9},
    "det_small": {"map50": 0.75, "samples": 4, "broken": 1},
    "det_small_far": {"map50": 0.5, "samples": 2},
    "ema": {"top1": 0.625, "samples": 3},
}
TRAINED = Evaluation(VALUES, score=0.5)
AVERAGE = Evaluation({task: {name: value / 2 for name, value in VALUES[task].items()} for task in VALUES}, score=0.25)


@pytest.mark.parametrize("tasks", itertools.permutations(VALUES))
def test_nesting_is_the_inverse_of_flattening(tasks: tuple[str, ...]) -> None:
    record = {"step": 4, "loss/det": 1.0, "eval_runtime": 2.0, "eval_ema_runtime": 3.0}
    record |= {**flatten(TRAINED), **flatten(AVERAGE, AVERAGED_PREFIX)}
    record = json.loads(json.dumps(record))
    assert nest(record, tasks) == TRAINED
    assert nest(record, tasks, AVERAGED_PREFIX) == AVERAGE


def test_flat_names_are_those_of_trainer() -> None:
    assert flatten(Evaluation({"det": {"map50": 0.25, "samples": 9}}, 0.25), "test") == {
        "test_det_map50": 0.25,
        "test_det_samples": 9,
        "test_score": 0.25,
    }


def test_a_record_without_an_evaluation_is_empty() -> None:
    assert nest({"step": 1, "loss": 2.0, "eval_det_map50": None}, ["det"]) == Evaluation({}, None)
    assert flatten(Evaluation({}, None)) == {}


def test_counts_of_images_are_no_metrics() -> None:
    assert TRAINED.metrics("det_small") == {"map50": 0.75}
    labels = labelled_metrics({**flatten(TRAINED), **flatten(AVERAGE, AVERAGED_PREFIX)}, VALUES)
    assert labels["det_small: map50"] == 0.75 and labels["det_small: map50, averaged weights"] == 0.375
    assert list(labels)[-1] == "score" and len(labels) == 2 * 5 + 1


def with_classes(count: int) -> Evaluation:
    names = [f"c{k}" for k in range(count)]
    found: dict[str, Any] = {"classes": names, "per_class": {"iou": [k / count for k in range(count)], "pixels": names}}
    found["per_class"]["iou"][0] = None
    return Evaluation({"seg": {"miou": 0.5, "samples": 3}}, 0.5, {"seg": found})


def test_values_per_class_are_logged_for_few_classes_and_are_no_metrics() -> None:
    few = flatten(with_classes(4))
    of_classes = {"eval_seg_class/c1/iou": 0.25, "eval_seg_class/c2/iou": 0.5, "eval_seg_class/c3/iou": 0.75}
    assert few == {"eval_seg_miou": 0.5, "eval_seg_samples": 3, "eval_score": 0.5, **of_classes}
    assert nest(few, ["seg"]) == Evaluation({"seg": {"miou": 0.5, "samples": 3}}, 0.5)
    assert labelled_metrics(few, ["seg"]) == {"seg: miou": 0.5, "score": 0.5}
    assert metrics_line(few) == "seg_miou 0.500  score 0.500"
    most, more = (len(flatten(with_classes(count))) for count in (MAX_LOGGED_CLASSES, MAX_LOGGED_CLASSES + 1))
    assert (most, more) == (3 + MAX_LOGGED_CLASSES - 1, 3)
