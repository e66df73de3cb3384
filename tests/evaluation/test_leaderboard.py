"""Leaderboard scores and the predictions that they are computed from."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from allinone_ds import cli, commands
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation import leaderboard as score_module
from allinone_ds.evaluation.leaderboard import score_run
from allinone_ds.run_config.build import build_model, open_test_data
from allinone_ds.run_config.run_files import read_run_files
from tests.export.untrained import untrained_run


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with fresh weights on the demo's tiny data."""
    folder = tmp_path_factory.mktemp("score") / "run"
    untrained_run(folder, "conv", home=home)
    return folder


def test_the_score_is_that_of_the_predictions_in_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", str(run), "--leaderboard", "A"]) == 0
    said = capsys.readouterr().out
    content = json.loads((run / "submission_A.json").read_text())
    config, facts = read_run_files(run)
    model = build_model(config, facts)
    main = []
    for name, data in open_test_data(config, facts.classes).items():
        part = content["tasks"][name]
        assert part["classes"] == facts.classes[name] and part["kind"] == model.tasks[name].kind
        samples = [data.dataset[index] for index in range(len(data.dataset))]
        assert [row["image"] for row in part["predictions"]] == [
            Path(sample["path"]).relative_to(config.data_root).as_posix() for sample in samples
        ]
        metric = model.tasks[name].metric()
        for sample, row in zip(samples, part["predictions"], strict=True):
            prediction = {key: value if key == "label" else torch.tensor(value) for key, value in row.items()
                          if key in ("label", "scores", "labels")}  # fmt: skip
            if "boxes" in row:
                prediction["boxes"] = torch.tensor(row["boxes"]).reshape(-1, 4)
                prediction["labels"] = prediction["labels"].long()
            if "mask_png" in row:
                picture = Image.open(io.BytesIO(base64.b64decode(row["mask_png"])))
                prediction["mask"] = torch.from_numpy(np.array(picture))
                assert prediction["mask"].shape == sample["mask"].shape
            metric.update([prediction], [sample])
        main.append(metric.compute()[model.tasks[name].main_metric])
        assert content["metrics"][name][model.tasks[name].main_metric] == pytest.approx(main[-1], abs=1e-6)
    assert len(main) == 3 and content["score"] == pytest.approx(sum(main) / 3, abs=1e-6)
    assert f"{content['score']:.6f}" in said


def test_each_leaderboard_is_the_mean_of_its_own_metrics(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"det": {"map50": 0.8, "map": 0.3}, "seg": {"miou": 0.4}, "cls": {"top1": 0.1}}
    monkeypatch.setattr(score_module, "evaluate_task", lambda model, name, *rest, **more: values[name])
    found = {board: score_run(run, board, tmp_path / board) for board in ("A", "B")}
    assert found["A"]["score"] == pytest.approx(1.3 / 3) and found["A"]["metrics"] == values
    assert found["B"]["score"] == pytest.approx(0.45)
    assert found["B"]["metrics"] == {task: values[task] for task in ("cls", "det")}


def test_overrides_reach_the_views_that_are_scored(run: Path, tmp_path: Path) -> None:
    found = []
    for number, views in enumerate(([], ["tasks.seg.test_time.flip=true", "tasks.seg.test_time.scales=[1.0,2.0]"])):
        file = tmp_path / f"{number}.json"
        assert cli.main(["score", str(run), "--leaderboard", "A", "--output", str(file), *views]) == 0
        found.append(json.loads(file.read_text())["tasks"])
    assert found[0]["seg"]["predictions"] != found[1]["seg"]["predictions"]
    assert found[0]["det"] == found[1]["det"] and found[0]["cls"] == found[1]["cls"]


def test_a_leaderboard_needs_one_task_of_every_kind(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    del content["tasks"]["seg"]["test"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="exactly one segmentation task with test data for its miou.*has 0"):
        score_run(folder, "A")
    assert set(score_run(folder, "B")["metrics"]) == {"det", "cls"}
    with pytest.raises(ConfigError, match="other data"):
        commands._train_on_other_data(cli._parser().parse_args(["score", str(run), "--leaderboard", "B"]))


def test_leaderboard_b_trains_the_same_run_on_other_data_under_zero_3(
    run: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(home / "data", other)
    for split in ("train", "test"):  # signs of other names
        file = other / "detection" / f"{split}.json"
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = f"other {category['name']}"
        file.write_text(json.dumps(content))
    small = ["trainer.max_steps=1", "trainer.learning_rate=1e-9", "trainer.eval_strategy=no"]
    command = ["score", str(run), "--leaderboard", "B", "--output", str(tmp_path / "B"), f"data_root={other}", *small]
    assert cli.main([*command, "deepspeed.zero_optimization.stage=3", "--nproc", "2"]) == 0
    assert "leaderboard B" in capsys.readouterr().out
    content = json.loads((tmp_path / "B" / "submission_B.json").read_text())
    assert set(content["tasks"]) == {"det", "cls"} and content["tasks"]["det"]["classes"][0].startswith("other ")
    main = [content["metrics"]["det"]["map50"], content["metrics"]["cls"]["top1"]]
    assert content["score"] == pytest.approx(sum(main) / 2)
    first, second = load_file(run / "model.safetensors"), load_file(tmp_path / "B" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.allclose(value, second[name], atol=1e-6)
        fresh = name.startswith("tasks.det.") and name.endswith("cls_logits.weight")
        prior = name == "tasks.seg.segmenter.classifier.bias"  # the run was not trained, so its bias is 0
        assert same or prior or name.startswith("tasks.det."), name
        assert not (fresh and same), name
