"""Every page lists a metric under its own task, where one task's name begins another's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from allinone_ds import cli, commands
from allinone_ds.evaluation import evaluate, predictor
from allinone_ds.export.folders import export_run
from allinone_ds.reporting.pictures import save_pictures
from allinone_ds.reporting.report import write_predictions_page
from tests.export import untrained
from tests.tiny_run import tiny_run

DET = {"map50": 0.25, "samples": 9}
SMALL = {"map50": 0.75, "samples": 4}


def two_tasks(folder: Path) -> dict[str, Any]:
    content = tiny_run(folder)
    content["tasks"] = dict.fromkeys(("det", "det_small"), content["tasks"]["det"])
    return content


def metrics() -> dict[str, Any]:
    """Content of metrics.json, also with the averaged weights."""
    values = {f"det_{key}": value for key, value in DET.items()} | {f"det_small_{k}": v for k, v in SMALL.items()}
    trained = {f"eval_{key}": value for key, value in values.items()}
    averaged = {f"eval_ema_{key}": value / 2 if isinstance(value, float) else value for key, value in values.items()}
    return {"steps": 7, "world_size": 2, **trained, "eval_score": 0.5, **averaged, "eval_ema_score": 0.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(two_tasks(tmp_path)))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    return tmp_path


def rows_of(page: str) -> list[list[str]]:
    return [re.sub("<.*?>", "|", row).split("||") for row in page.split("<tr>")]


def assert_rows(rows: list[list[str]]) -> None:
    assert ["det", "map50", "0.250", "9"] in rows and ["det_small", "map50", "0.750", "4"] in rows
    assert not [row for row in rows if "small_map50" in row]


def test_the_table_of_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = SimpleNamespace(main_metric="map50", classes=["circle"], better_is_greater=lambda metric: True)
    model = SimpleNamespace(tasks={"det": task, "det_small": task}, eval=lambda: None)
    values = {"det": DET, "det_small": SMALL}
    monkeypatch.setattr(predictor, "load_run", lambda *args: (model, None))
    monkeypatch.setattr(predictor, "open_test_data", lambda *args: dict.fromkeys(values, SimpleNamespace(joint=None)))
    monkeypatch.setattr(evaluate, "evaluate_task", lambda model, name, *args: values[name])
    assert cli.main(["eval", "runs/two"]) == 0
    assert_rows([line.split() for line in capsys.readouterr().out.splitlines()])


def test_the_summary_after_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.print_summary(run, 60.0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert_rows(rows)
    averaged = rows[rows.index(["averaged", "weights"]) :]
    assert ["det", "map50", "0.125", "9"] in averaged and ["det_small", "map50", "0.375", "4"] in averaged


def test_the_report_page(run: Path) -> None:
    content = two_tasks(run)
    content["tasks"]["ema"] = content["tasks"]["det"]  # "eval_ema_" is also the prefix of the averaged weights
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["report", str(run)]) == 0
    results = {row[0].strip("|"): row[1].strip("|") for row in rows_of((run / "report.html").read_text()) if row[1:]}
    assert {name: value for name, value in results.items() if "map50" in name} == {
        "det: map50": "0.2500",
        "det_small: map50": "0.7500",
        "det: map50, averaged weights": "0.1250",
        "det_small: map50, averaged weights": "0.3750",
    }


def test_the_predictions_page(run: Path) -> None:
    save_pictures({"det_small": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, run)
    text = write_predictions_page(run).read_text()
    results = {row[0].strip("|"): row[1].strip("|") for row in rows_of(text) if row[1:]}
    assert results["det: map50"] == "0.2500" and results["det_small: map50"] == "0.7500"
    assert "small_map50" not in text and "det_small, test image 1: prediction and truth" in text


def test_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained, "tiny_run", two_tasks)
    untrained.untrained_run(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    export_run(tmp_path)
    one = (tmp_path / "export" / "tasks" / "det" / "README.md").read_text()
    assert "| det | map50 | 0.2500 | 9 |" in one and "0.7500" not in one
    whole = (tmp_path / "export" / "model" / "README.md").read_text()
    assert "| det_small | map50 | 0.7500 | 4 |" in whole and "small_map50" not in whole
