"""The runs of configs/runs/kinds on small data: checked, drawn, evaluated, predicted and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allinone_ds import cli
from allinone_ds.evaluation.predictor import evaluate_run
from allinone_ds.export.folders import export_run
from allinone_ds.run_config.build import build_model, open_train_data
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_folder.names import WEIGHTS_FILE
from allinone_ds.tasks.frequencies import use_frequencies
from benchmarks.heads.shapes import write_shapes

ROOT = Path(__file__).parents[2]
KINDS = sorted(path.stem for path in (ROOT / "configs" / "runs" / "kinds").glob("*.yaml") if path.stem != "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=12, test=5)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_a_run_of_this_kind(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(ROOT / "configs" / "runs" / "kinds" / f"{kind}.yaml")
    overrides = [f"data_root={data}", f"output_dir={tmp_path / 'run'}"]
    assert cli.main(["check", run, *overrides]) == 0, capsys.readouterr().out
    assert cli.main(["preview", run, *overrides, "--output", str(tmp_path / "preview.png")]) == 0
    config = load_config(run, overrides)
    (name, task), *_ = config.tasks.items()
    opened = open_train_data(config)
    facts = ModelFacts(backbone=config.model.backbone, classes={name: list(opened[name].dataset.classes)})
    torch.manual_seed(0)
    model = build_model(config, facts).eval()
    use_frequencies(dict(model.tasks.items()), {name: opened[name].dataset})
    save_run_files(config, facts, tmp_path / "run")
    save_file(model.state_dict(), tmp_path / "run" / WEIGHTS_FILE)
    values = evaluate_run(tmp_path / "run", ["data_root=" + str(data)])
    assert values.tasks[name].keys() >= {model.tasks[name].main_metric, "samples"}
    images = sorted((data / ("marks/test" if kind == "retrieval" else "images/test")).rglob("*.png"))[:2]
    assert cli.main(["predict", str(tmp_path / "run"), *map(str, images), "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(name in json.loads(line) for line in lines)
    export_run(tmp_path / "run")
    card = next((tmp_path / "run" / "export").rglob("README.md")).read_text()
    assert f"({task.type}, head {model.tasks[name].head_name}" in card
    capsys.readouterr()


def test_statistics_of_a_regression_are_in_its_weights(data: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/runs/kinds/regression.yaml", [f"data_root={data}"])
    opened = open_train_data(config)
    facts = ModelFacts(backbone=config.model.backbone, classes={"numbers": ["objects", "covered"]})
    model = build_model(config, facts)
    notes = use_frequencies(dict(model.tasks.items()), {"numbers": opened["numbers"].dataset})
    assert len(notes) == 1 and "mean and standard deviation of 12 training images: objects" in notes[0]
    again = build_model(config, facts).bfloat16()
    again.load_state_dict(model.state_dict())
    for mine, theirs in zip(model.tasks["numbers"].moments, again.tasks["numbers"].moments, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == torch.float64
    assert use_frequencies(dict(again.tasks.items()), {"numbers": opened["numbers"].dataset}) == []  # trained ones stay
