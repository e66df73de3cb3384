"""Tables per class, confusion matrices and the worst predictions in the report and in the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from allinone_ds import cli
from allinone_ds.data.augmentation.transforms import eval_transform
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.evaluation import predictor
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.reporting.class_tables import MATRIX, ROWS, class_tables
from allinone_ds.reporting.pictures import collect_drawings, save_pictures
from allinone_ds.reporting.report import write_report
from allinone_ds.run_folder.names import WORST_PICTURES
from allinone_ds.tasks.classification import ClassificationMetric
from tests.reporting.test_report import Seen, finished_run
from tests.tiny import SIZE, samples, tiny_model


def details_of(classes: list[str], wrong: int = 3) -> dict[str, Any]:
    """Details of a classification whose last `wrong` images of the first class are taken for the last one."""
    metric = ClassificationMetric(len(classes))
    true = [k for k in range(len(classes)) for _ in range(8 if k == 0 else 4)]
    predicted = list(true)
    predicted[:wrong] = [len(classes) - 1] * wrong
    metric.update([{"label": k} for k in predicted], [{"label": k} for k in true])
    metric.compute()
    return metric.details(classes)


def run_with(folder: Path, details: dict[str, Any]) -> Path:
    run = finished_run(folder)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"details": details}))
    return run


def rows(text: str) -> list[str]:
    found = re.findall("<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [re.sub(r"\|+", "|", re.sub("<.*?>", "|", row)).strip("|\n ") for row in found]


def test_the_report_has_every_class_the_matrix_and_the_worst_images(tmp_path: Path) -> None:
    worst = [{"index": 4, "path": "/data/cats/x<1>.jpg", "score": 0.0125}, {"index": 2, "path": "y.jpg", "score": 0.5}]
    run = run_with(tmp_path / "run", {"cls": details_of(["<cat>", "dog", "cow"]) | {"worst": worst}})
    save_pictures({"cls": [torch.zeros(3, 40, 40, dtype=torch.uint8)] * 2}, run, WORST_PICTURES)
    text = write_report([run]).read_text()
    assert "<h2>Classes</h2>" in text and "<cat>" not in text
    assert "&lt;cat&gt;|0.625|1.000|8|5" in rows(text) and "cow|1.000|0.571|4|7" in rows(text)
    assert "&lt;cat&gt;|62.5|37.5" in rows(text)  # the matrix, in percent of the row
    assert "x&lt;1&gt;.jpg: 0.013" in text and "y.jpg: 0.500" in text
    assert sum("cls, test image" in picture["alt"] for picture in Seen(text).pictures) == 3 + 2


def test_runs_stand_side_by_side_with_their_own_classes(tmp_path: Path) -> None:
    first = run_with(tmp_path / "a", {"cls": details_of(["cat", "dog"], wrong=4)})
    second = run_with(tmp_path / "b", {"cls": details_of(["dog", "cat"], wrong=2)})
    text = write_report([first, second], tmp_path / "both.html").read_text()
    assert "cat|0.500|1.000" in rows(text) and "dog|1.000|0.750" in rows(text)
    assert "Confusion matrix" not in text
    without = finished_run(tmp_path / "c")
    assert "cat|0.500" in rows(write_report([first, without], tmp_path / "one.html").read_text())
    assert "<h2>Classes</h2>" not in write_report([without]).read_text()


def test_many_classes_are_a_short_table_and_the_most_frequent_confusions(tmp_path: Path) -> None:
    classes = [f"c{k}" for k in range(ROWS + 20)]
    run = run_with(tmp_path / "run", {"cls": details_of(classes)})
    text = write_report([run]).read_text()
    listed = [row for row in rows(text) if re.match(r"c\d+\|[\d.]+\|", row)]
    assert len(listed) == ROWS and listed[0].startswith("c0|0.625")  # the lowest first
    assert f"the {ROWS} of {len(classes)} with the lowest accuracy; metrics.json has all" in text
    assert "Confusion matrix" not in text and f"c0|c{len(classes) - 1}|3" in rows(text)
    fewer = run_with(tmp_path / "fewer", {"cls": details_of([f"c{k}" for k in range(MATRIX)])})
    assert "Confusion matrix" in write_report([fewer]).read_text()


def test_the_terminal_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100)
    worst = {"worst": [{"index": 3, "path": "a/b.jpg", "score": 0.25}]}
    for table in class_tables({"cls": details_of(["cat", "dog"]) | worst, "own": {"worst": []}}):
        console.print(table)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "0.625", "1.000", "8", "5"] in lines and ["cat", "dog", "3"] in lines
    assert ["a/b.jpg", "0.250"] in lines
    assert len([line for line in lines if "own:" in line]) == 0


def test_chosen_images_are_drawn_in_their_order() -> None:
    model = tiny_model()
    made = samples(6)
    data = {
        name: TaskData(made, eval_transform(SIZE), task.collate, batch_size=2)  # type: ignore[arg-type]
        for name, task in model.tasks.items()
    }
    device = torch.device("cpu")
    every = collect_drawings(model, data, device, 6, True)
    chosen = collect_drawings(model, data, device, 6, True, {"det": [5, 0], "seg": [3]})
    assert set(chosen) == {"det", "seg"} and len(chosen["det"]) == 2
    assert torch.equal(chosen["det"][0], every["det"][5]) and torch.equal(chosen["det"][1], every["det"][0])
    assert torch.equal(chosen["seg"][0], every["seg"][3])


def test_eval_prints_classes_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    details = {"cls": details_of(["cat", "dog"]) | {"notes": ["3 of 9 images have more objects"]}}
    found = Evaluation({"cls": {"top1": 0.75, "samples": 12}}, 0.75, details)
    monkeypatch.setattr(predictor, "evaluate_run", lambda *args: found)
    assert cli.main(["eval", "runs/one"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "0.625", "1.000", "8", "5"] in lines
    assert "warning: cls: 3 of 9 images have more objects".split() in lines
