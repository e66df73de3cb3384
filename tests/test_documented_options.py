"""The tables of docs/ name every option there is, with the default it has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torchjd.aggregation
import yaml

from allinone_ds import TBGC
from allinone_ds.balance.options import NORMS, PARALLEL, TORCHJD, WEIGHTINGS, combination_error
from allinone_ds.data.augmentation.catalog import OWN
from allinone_ds.data.formats.maps.values import DENSE_KINDS, MapValues
from allinone_ds.run_config.schema import TaskConfig
from allinone_ds.tasks import TASKS
from allinone_ds.tasks.test_time import TestTime

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of every row of every table of a page."""
    lines = (DOCS / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def test_every_option_of_every_head() -> None:
    documented = {
        (row[0].strip("` "), row[1].strip("`")): yaml.safe_load(row[2])
        for row in rows("heads.md")
        if len(row) == 4 and re.fullmatch(r"`\w+`", row[1])
    }
    tasks = [task for kind, task in TASKS.items() if kind not in DENSE_KINDS]
    heads = {name: options for task in tasks for name, options in task.HEADS.items()}
    found = {(name, key): field.default for name, model in heads.items() for key, field in model.model_fields.items()}
    assert documented == found


def test_every_option_of_every_head_of_a_kind_with_maps() -> None:
    documented = {
        (kind, head, row[2].strip("`")): yaml.safe_load(row[3])
        for row in rows("heads.md")
        if len(row) == 5 and re.fullmatch(r"`\w+`", row[2])
        for kind in row[0].strip("| ").split(", ")
        for head in re.findall(r"`(\w+)`", row[1])
    }
    found = {
        (kind, head, key): field.default
        for kind in DENSE_KINDS
        for head, model in TASKS[kind].HEADS.items()
        for key, field in model.model_fields.items()
    }
    assert documented == found


def test_every_key_of_a_map() -> None:
    keys = [row[0] for row in rows("data-formats.md") if len(row) == 4]
    documented = [key for cell in keys for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(MapValues.model_fields)


def test_every_option_of_the_views() -> None:
    start = [row[0].strip("` ") for row in rows("heads.md")]
    documented = {row[0].strip("` "): yaml.safe_load(row[1]) for row in rows("heads.md")[start.index("scales") :][:3]}
    assert documented == {name: field.default for name, field in TestTime.model_fields.items()}


def test_every_option_of_every_transform_of_the_package() -> None:
    documented = {}
    for row in rows("augmentation.md"):
        for name in re.findall(r"`(\w+)`", row[0]):
            if name in OWN:
                documented[name] = {k: yaml.safe_load(v) for k, v in re.findall(r"`(\w+): ([^`]+)`", row[2])}
    assert set(documented) == set(OWN)
    for name, cls in OWN.items():
        if name != "ColorJitter":  # torchvision's options
            given = {key: p.default for key, p in inspect.signature(cls).parameters.items() if key != "size"}
            found = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
            assert documented[name] == found, name


def test_every_key_of_a_task() -> None:
    page = rows("data-formats.md")
    start = next(number for number, row in enumerate(page) if row[0].strip() == "key of a task")
    documented = [name for row in page[start + 1 :] for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(documented) == sorted(TaskConfig.model_fields)


def test_the_table_of_combinations_is_what_the_rules_say() -> None:
    engines = {"ZeRO 0": (0, False), "ZeRO 1, bf16 with fp32 accumulation": (1, False), **{
        f"ZeRO {stage}": (stage, True) for stage in (1, 2, 3)}}  # fmt: skip

    def cell(norm: str, parallel: str, engine: str) -> str:
        for answer, weighting in (("yes", TBGC(target="mean")), ("one at a time", TBGC())):
            if combination_error(norm, parallel, weighting, *engines[engine]) is None:
                return answer
        return "no"

    page = [row for row in rows("balancer.md") if len(row) == 7]
    header, *body = [[cell.strip("| ") for cell in row] for row in page]
    assert header == ["norm", "parallel", *engines]
    assert sorted(row[:2] for row in body) == sorted([norm, parallel] for norm in NORMS for parallel in PARALLEL)
    for norm, parallel, *cells in body:
        assert cells == [cell(norm, parallel, engine) for engine in engines], (norm, parallel)


def test_every_option_of_every_weighting() -> None:
    text = (DOCS / "method.md").read_text().split("### Options")[1].split("\n## ")[0]
    documented = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            names, options = line.strip("| ").split(" | ")
            values = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): ([^`]+)`", options)}
            documented |= dict.fromkeys(re.findall(r"`(\w+)`", names), values)

    def default(parameter: inspect.Parameter) -> object:
        return "needed" if parameter.default is inspect.Parameter.empty else parameter.default

    found = {}
    for name in (*WEIGHTINGS, *TORCHJD):
        make = WEIGHTINGS.get(name) or getattr(torchjd.aggregation, TORCHJD[name])
        given = inspect.signature(make.__init__).parameters.items()
        found[name] = {key: default(p) for key, p in given if key not in ("self", "args", "kwargs", "projector")}
    assert documented == found


def test_every_weighting_has_a_row_of_steps_without_some_tasks() -> None:
    text = (DOCS / "balancer.md").read_text().split("## Steps without some tasks")[1].split("\n## ")[0]
    names = [
        n for line in text.splitlines() if line.startswith("| `") for n in re.findall(r"`(\w+)`", line.split(" | ")[0])
    ]
    assert sorted(names) == sorted([*WEIGHTINGS, *TORCHJD])


def test_weightings_that_need_one_task_at_a_time_are_listed() -> None:
    named = re.search(r"one task at a\s+time \((.*?)\)", (DOCS / "balancer.md").read_text(), re.DOTALL)
    assert named is not None
    streaming = [name for name, kind in WEIGHTINGS.items() if kind.streams or name == "tbgc"]
    assert sorted(re.findall(r"`(\w+)`", named[1])) == sorted(streaming)
