"""A run of the four kinds with maps, without DeepSpeed: data, evaluation, export, prediction, preview and plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import allinone_ds
from allinone_ds.data.check import check_sources
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.evaluation.constant import constant_metrics
from allinone_ds.evaluation.evaluate import evaluate_tasks
from allinone_ds.evaluation.metrics import flatten, nest
from allinone_ds.evaluation.predictor import predict_images
from allinone_ds.export.folders import export_run
from allinone_ds.planning.plan import plan_run
from allinone_ds.reporting.class_tables import class_tables
from allinone_ds.reporting.preview import preview_run
from allinone_ds.run_config.build import build_model, inspect_data, open_test_data, open_train_data
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.run_folder.names import WEIGHTS_FILE
from benchmarks.heads.dense_scenes import scene, write_scenes
from tests.tasks.dense.tiny import KINDS, build
from tests.tiny import TINY

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The documented run with a tiny backbone and few scenes."""
    folder = tmp_path_factory.mktemp("dense")
    write_scenes(folder / "data", train=6, test=3)
    small = [f"tasks.{kind}.options.width=16" for kind in KINDS]
    loaded = load_config(
        ROOT / "configs/runs/dense.yaml", [f"data_root={folder / 'data'}", f"output_dir={folder / 'run'}", *small]
    )
    backbone = {"stem": "conv", "config": {**TINY, "patch_size": 8, "image_size": 64}}
    model = type(loaded.model).model_validate({"backbone": backbone})
    return loaded.model_copy(update={"model": model})


def test_every_kind_is_opened_evaluated_exported_and_predicted(config: RunConfig, tmp_path: Path) -> None:
    train = open_train_data(config)
    test = open_test_data(config, {name: part.dataset.classes for name, part in train.items()})
    inspect_data(config, train, test)
    assert all(part.dataset.classes == [] and not part.dataset.structural for part in [*train.values(), *test.values()])
    facts = ModelFacts(backbone=config.model.backbone, classes=dict.fromkeys(config.tasks, []))
    torch.manual_seed(0)
    model = build_model(config, facts).eval()
    found = evaluate_tasks(model, test, torch.device("cpu"))
    assert set(found.tasks) == set(KINDS) and found.score is not None and 0 < found.score < 1
    assert not found.warnings and not any("per_class" in details for details in found.details.values())
    assert {task: values["samples"] for task, values in found.tasks.items()} == dict.fromkeys(KINDS, 3)
    assert "ods_threshold" in found.tasks["edges"]
    assert nest(flatten(found), KINDS).tasks["normals"] == found.tasks["normals"]
    assert len(list(class_tables(found.details))) == 4  # images with low scores
    assert json.loads(json.dumps(found.details)) == found.details

    save_run_files(config, facts, config.run_dir)
    save_file(model.state_dict(), config.run_dir / WEIGHTS_FILE)
    exported = export_run(config.run_dir)
    image = tmp_path / "a.png"
    Image.fromarray(scene(np.random.default_rng(5))["image"]).resize((120, 90)).save(image)
    whole = allinone_ds.load(config.run_dir)
    for kind in KINDS:
        folder = config.run_dir / "export" / "tasks" / kind
        one = allinone_ds.load(folder)
        expected, [again] = whole.predict(image, kind)[0][kind], one.predict(image)
        assert torch.equal(expected, again[kind]) and expected.shape[-2:] == (90, 120)
        card = (folder / "README.md").read_text()
        assert "## Classes" not in card and f"`{kind}` ({kind}, head light" in card and "dense_maps" in card
    assert "pipeline_tag: depth-estimation" in (config.run_dir / "export/tasks/depth/README.md").read_text()
    assert len(exported.folders) == 5

    written = predict_images(config.run_dir, [image], tmp_path / "out")
    assert sorted(file.name for file in written) == [
        "a-depth.png",
        "a-edges.png",
        "a-normals.png",
        "a-saliency.png",
        "a.json",
    ]
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["depth"]["least"] <= record["depth"]["median"] <= record["depth"]["largest"]
    assert np.linalg.norm(record["normals"]["mean"]) <= 1 and 0 <= record["edges"]["share"] <= 1


def test_preview_check_and_plan_know_the_kinds(config: RunConfig, tmp_path: Path) -> None:
    files = preview_run(config, tmp_path / "p.png", 2)
    assert len(files) == 4 and all(np.asarray(Image.open(file)).std() > 20 for file in files)
    sources = {name: task.train_source for name, task in config.tasks.items()}
    assert check_sources(sources, config.data_root, progress=False) == []
    away = config.model_copy(update={"data_root": Path("/nowhere")})
    planned = plan_run(away, gpus=2)
    assert not any("classes are assumed" in note or "activations of the loss" in note for note in planned.notes)
    assert all(value > 0 for value in planned.activations.values())


def test_constant_predictions_have_the_metrics_that_the_benchmark_prints(config: RunConfig) -> None:
    data = {name: part.dataset for name, part in open_train_data(config).items()}
    for kind in KINDS:
        found = constant_metrics(build(kind)[1], data[kind], data[kind])
        assert all(np.isfinite(value) for value in found.values())
    assert constant_metrics(build("saliency")[1], data["saliency"], data["saliency"])["mae"] < 0.5


def test_data_of_another_kind_and_classes_are_refused(config: RunConfig) -> None:
    task = config.tasks["depth"]
    normals = config.model_copy(
        update={"tasks": {"depth": task.model_copy(update={"train": config.tasks["normals"].train})}}
    )
    with pytest.raises(ConfigError, match="the data is for normals, the task is a depth"):
        open_train_data(normals)
    named = config.model_copy(update={"tasks": {"depth": task.model_copy(update={"classes": ["near", "far"]})}})
    with pytest.raises(DataError, match="depth has no classes; remove 'classes'"):
        open_train_data(named)


def test_a_split_and_several_sources_need_no_classes(config: RunConfig) -> None:
    task = config.tasks["depth"]
    several = {"train": [task.train, task.test], "test": None, "split": {"test": 0.3}}
    content = {**task.model_dump(exclude={"augment"}), **several}
    both = config.model_copy(update={"tasks": {"depth": type(task).model_validate(content)}})
    train = open_train_data(both)
    test = open_test_data(both, {"depth": train["depth"].dataset.classes})
    assert len(train["depth"].dataset) + len(test["depth"].dataset) == 9 and train["depth"].dataset.classes == []


def test_scenes_have_consistent_targets() -> None:
    made = scene(np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(made["normals"], axis=-1), 1, atol=1e-6)
    assert (made["normals"][..., 2] >= -1e-6).mean() > 0.99 and made["depth"].min() > 0.3
    # the normals are those of the surface that the depth describes, away from outlines
    y, x = np.mgrid[: made["depth"].shape[0], : made["depth"].shape[1]]
    rays = np.stack([(x - 39.5) / 70, (y - 31.5) / 70, np.ones_like(x, float)], axis=-1)
    points = rays * made["depth"][..., None]
    right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    normals = np.cross(right, down)
    normals *= -np.sign((normals * points[1:-1, 1:-1]).sum(-1, keepdims=True))  # towards the camera
    normals = normals / np.linalg.norm(normals, axis=-1, keepdims=True) * [1, 1, -1]
    near = np.zeros_like(made["edges"])
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            near |= np.roll(made["edges"], (dy, dx), (0, 1))
    angle = np.rad2deg(np.arccos(np.clip((normals * made["normals"][1:-1, 1:-1]).sum(-1), -1, 1)))
    assert np.median(angle[~near[1:-1, 1:-1]]) < 1
