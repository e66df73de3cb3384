"""Two detection sets with different classes: the run of configs/runs/two_sets.yaml on small demo data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allinone_ds import cli
from allinone_ds.data.demo.two_sets import SETS, write_two_sets
from allinone_ds.evaluation.predictor import evaluate_run
from allinone_ds.run_config.build import build_model, open_train_data
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.run_folder.names import WEIGHTS_FILE

RUN = str(Path(__file__).parents[2] / "configs" / "runs" / "two_sets.yaml")


@pytest.fixture(scope="module")
def data(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_sets") / "data"
    folder.mkdir()
    (folder / "detection").symlink_to(demo_data / "detection")
    write_two_sets(folder)
    return folder


def build(data: Path, *overrides: str) -> tuple[RunConfig, ModelFacts, torch.nn.Module]:
    config = load_config(RUN, [f"data_root={data}", *overrides])
    opened = open_train_data(config)
    facts = ModelFacts(
        backbone=config.model.backbone, classes={name: list(part.dataset.classes) for name, part in opened.items()}
    )
    torch.manual_seed(0)
    return config, facts, build_model(config, facts)


def test_each_set_labels_its_own_classes_in_images_of_its_own(data: Path, demo_data: Path) -> None:
    for split in ("train", "test"):
        tables = {name: json.loads((data / "two_sets" / name / f"{split}.json").read_text()) for name in SETS}
        every = json.loads((demo_data / "detection" / f"{split}.json").read_text())
        images = {name: {image["id"] for image in table["images"]} for name, table in tables.items()}
        assert not images["clothes"] & images["shoes"]
        assert len(images["clothes"] | images["shoes"]) == len(every["images"])
        for name, table in tables.items():
            assert {category["name"] for category in table["categories"]} == set(SETS[name])
            shown = [box for box in every["annotations"] if box["image_id"] in images[name]]
            assert 0 < len(table["annotations"]) < len(shown)  # products of the other set are there, without a box


def test_labels_of_one_set_teach_and_score_only_its_own_head(data: Path, tmp_path: Path) -> None:
    """Without the boxes of shoes nothing changes for clothes: neither the loss and its gradients, nor a metric."""
    blind = tmp_path / "blind"
    shutil.copytree(data / "two_sets", blind / "two_sets")
    for split in ("train", "test"):
        file = blind / "two_sets" / "shoes" / f"{split}.json"
        table = json.loads(file.read_text())
        file.write_text(json.dumps({**table, "annotations": table["annotations"][:1]}))
    seen = {}
    for root in (data, blind):
        config, facts, model = build(root, f"output_dir={tmp_path / root.name / 'run'}")
        opened = open_train_data(config)
        part = opened["clothes"]
        batch = part.collate([part.transform(part.dataset[index]) for index in range(3)])
        torch.manual_seed(1)
        model("clothes", **batch).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert not any(name.startswith("tasks.shoes.") for name in gradients)
        assert any(name.startswith("tasks.clothes.") for name in gradients)
        save_run_files(config, facts, tmp_path / root.name / "run")
        save_file(model.state_dict(), tmp_path / root.name / "run" / WEIGHTS_FILE)
        found = evaluate_run(tmp_path / root.name / "run")
        seen[root] = gradients, found.tasks["clothes"]
        assert set(facts.classes["clothes"]) == set(SETS["clothes"]) and found.tasks["clothes"]["samples"] == 5
    for name, gradient in seen[data][0].items():
        assert torch.equal(gradient, seen[blind][0][name]), name
    assert seen[data][1] == seen[blind][1]


def test_check_accepts_the_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", RUN, f"data_root={data}", f"output_dir={tmp_path}"]) == 0, capsys.readouterr().out
