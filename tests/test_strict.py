"""Errors of configurations name the nearest valid name at the place where it stands."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from allinone_ds.strict import Strict, did_you_mean, explain


class Coco(Strict):
    format: Literal["coco"]
    annotations: str


class Maps(Strict):
    format: Literal["maps"]
    label_maps: str


class Task(Strict):
    train: Annotated[Coco | Maps, Field(discriminator="format")]
    size: int = 1


class Run(Strict):
    tasks: dict[str, Task]
    rate: float = 0.1


def message(content: dict) -> str:
    with pytest.raises(ValidationError) as caught:
        Run.model_validate(content)
    return explain(caught.value, Run, "run.yaml")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"tasks": {}, "rat": 1}, "unknown key 'rat'; did you mean 'rate'? allowed: rate, tasks"),
        ({"tasks": {"a": {"train": {"format": "coco", "annotations": "x"}, "sise": 2}}}, "did you mean 'size'?"),
        ({"tasks": {"a": {"train": {"format": "coco", "anotations": "x"}}}}, "did you mean 'annotations'?"),
        ({"tasks": {"a": {"train": {"format": "maps", "label_map": "x"}}}}, "did you mean 'label_maps'?"),
        ({"tasks": {"a": {"train": {"format": "maps"}}}}, "label_maps' is missing; add it"),
        ({"tasks": {}, "rate": "fast"}, "'rate' = 'fast': Input should be a valid number"),
    ],
)
def test_a_mistake_names_what_is_allowed(content: dict, found: str) -> None:
    assert found in message(content) and message(content).startswith("run.yaml: ")


def test_nothing_near_lists_all() -> None:
    assert did_you_mean("xyz", ["det", "seg"]) == "allowed: det, seg"
