"""The tables of docs/ name every option there is, with the default it has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml

from allinone_ds.data.augmentation.catalog import OWN
from allinone_ds.run_config.schema import TaskConfig
from allinone_ds.tasks import TASKS
from allinone_ds.tasks.test_time import TestTime

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of every row of every table of a page."""
    lines = (DOCS / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def test_every_option_of_every_head() -> None:
    told = {
        (row[0].strip("` "), row[1].strip("`")): yaml.safe_load(row[2])
        for row in rows("heads.md")
        if len(row) == 4 and re.fullmatch(r"`\w+`", row[1])
    }
    heads = {name: options for task in TASKS.values() for name, options in task.HEADS.items()}
    found = {(name, key): field.default for name, model in heads.items() for key, field in model.model_fields.items()}
    assert told == found


def test_every_option_of_the_views() -> None:
    start = [row[0].strip("` ") for row in rows("heads.md")]
    told = {row[0].strip("` "): yaml.safe_load(row[1]) for row in rows("heads.md")[start.index("scales") :][:3]}
    assert told == {name: field.default for name, field in TestTime.model_fields.items()}


def test_every_option_of_every_transform_of_the_package() -> None:
    told = {}
    for row in rows("augmentation.md"):
        for name in re.findall(r"`(\w+)`", row[0]):
            if name in OWN:
                told[name] = {k: yaml.safe_load(v) for k, v in re.findall(r"`(\w+): ([^`]+)`", row[2])}
    assert set(told) == set(OWN)
    for name, cls in OWN.items():
        if name != "ColorJitter":  # torchvision's options
            given = {key: p.default for key, p in inspect.signature(cls).parameters.items() if key != "size"}
            found = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
            assert told[name] == found, name


def test_every_key_of_a_task() -> None:
    page = rows("data-formats.md")
    start = next(number for number, row in enumerate(page) if row[0].strip() == "key of a task")
    told = [name for row in page[start + 1 :] for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(told) == sorted(TaskConfig.model_fields)
