"""A joint group is evaluated, drawn and predicted from one forward of the backbone per batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from allinone_ds.data.joint.batches import by_task
from allinone_ds.evaluation.baselines import plan_baselines
from allinone_ds.evaluation.evaluate import evaluate_tasks
from allinone_ds.evaluation.predictor import Predictor, predict_images, predictor_of
from allinone_ds.export.folders import export_run
from allinone_ds.export.loading import load
from allinone_ds.model import AllInOneModel
from allinone_ds.reporting.pictures import collect_drawings
from allinone_ds.reporting.preview import preview_run
from allinone_ds.run_config.build import build_model, classes_of, open_test_data, open_train_data
from allinone_ds.run_config.run_files import ModelFacts, save_run_files
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.run_folder.names import WEIGHTS_FILE
from tests.joint_set import LABELLED, joint_run, make_joint_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    make_joint_set(folder / "data")
    (folder / "run.yaml").write_text(yaml.safe_dump(joint_run(folder)))
    return folder


@pytest.fixture
def config(home: Path) -> RunConfig:
    return load_config(home / "run.yaml")


def model_of(config: RunConfig) -> tuple[AllInOneModel, ModelFacts]:
    facts = ModelFacts(backbone=config.model.backbone, classes=classes_of(open_train_data(config)))
    torch.manual_seed(0)
    return build_model(config, facts).eval(), facts


def forwards(model: AllInOneModel) -> list[int]:
    """Return a list that grows by the number of images of each forward of the backbone."""
    sizes: list[int] = []
    model.backbone.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(inputs[0])))
    return sizes


def test_metrics_are_those_of_each_task_alone(config: RunConfig) -> None:
    """Also of a train set in which images lack labels."""
    model, facts = model_of(config)
    data = open_train_data(config)
    sizes = forwards(model)
    together = evaluate_tasks(model, data, CPU)
    assert sizes == [3] * 4
    alone = evaluate_tasks(model, by_task(data), CPU)
    assert len(sizes) == 4 + 4 + 3 + 4
    assert together.tasks == alone.tasks and together.score == alone.score
    assert [together.tasks[name]["samples"] for name in ("seg", "det", "cls")] == [12, 7, 10]


def test_views_of_one_task_need_forwards_of_their_own(home: Path) -> None:
    config = load_config(home / "run.yaml", ["tasks.seg.test_time={flip: true}"])
    model, facts = model_of(config)
    data = open_test_data(config, facts.classes)
    sizes = forwards(model)
    together = evaluate_tasks(model, data, CPU)
    assert sizes == [3, 3, 3, 2, 2, 2]
    assert together.tasks == evaluate_tasks(model, by_task(data), CPU).tasks


def test_pictures_show_all_tasks_of_the_group_and_the_worst_of_each(config: RunConfig) -> None:
    model, facts = model_of(config)
    data = open_train_data(config)
    pictures = collect_drawings(model, data, CPU, 2, draw=True)
    assert list(pictures) == ["rooms"] and len(pictures["rooms"]) == 2
    assert pictures["rooms"][0].shape[-1] > 4 * 320
    worst = collect_drawings(model, data, CPU, 2, True, {"det": [6, 11], "cls": [9]})
    assert {name: len(drawn) for name, drawn in worst.items()} == {"det": 1, "cls": 1}  # image 11 has no boxes


def test_the_preview_has_the_truth_of_all_tasks(config: RunConfig, tmp_path: Path) -> None:
    [file] = preview_run(config, tmp_path / "look.png", samples=2)
    assert file.name == "look-rooms.png" and Image.open(file).width > 2 * 3 * 320


def test_an_exported_group_predicts_in_one_forward(config: RunConfig, home: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, facts = model_of(config)
    save_run_files(config, facts, tmp_path / "run")
    save_file(dict(model.state_dict()), tmp_path / "run" / WEIGHTS_FILE)
    export_run(tmp_path / "run")
    loaded = load(tmp_path / "run" / "export" / "model")
    assert loaded.joint == {"rooms": ("seg", "det", "cls")} == predictor_of(model, config).joint
    sizes = forwards(loaded.model)
    images = sorted((home / "data" / "test" / "images").iterdir())[:2]
    written = predict_images(loaded, images, tmp_path / "out")
    assert sizes == [2]
    assert {file.name for file in written} == {
        f"{n:03}{end}" for n in (0, 1) for end in (".json", "-seg.png", "-det.png", "-cls.png", "-rooms.png")
    }
    alone = Predictor(loaded.model)
    for name, found in loaded.predict_tasks(images).items():
        for mine, other in zip(found, alone.predict(images, name), strict=True):
            assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in other)
    assert list(loaded.predict_tasks(images, ["cls"])) == ["cls"]
    part = predict_images(loaded, images[:1], tmp_path / "part", tasks=["seg", "cls"])
    assert {file.name for file in part} == {"000.json", "000-seg.png", "000-cls.png"}


def test_a_baseline_trains_one_task_of_the_group_on_the_images_with_its_labels(config: RunConfig, home: Path) -> None:
    folder = home / "ended"
    _, facts = model_of(config)
    save_run_files(config, facts, folder)
    (folder / "log.jsonl").write_text('{"event": "begin", "step": 0, "max_steps": 3, "time": 0}\n')
    (folder / "metrics.json").write_text('{"eval_det_map50": 0.5, "eval_seg_miou": 0.5, "eval_cls_top1": 0.5}')
    planned = {baseline.task: load_config(baseline.file) for baseline in plan_baselines(folder)}
    assert sorted(planned) == ["cls", "det", "seg"]
    for task, count in LABELLED.items():
        alone = planned[task]
        assert list(alone.tasks) == [task] and alone.joint["rooms"].tasks == [task]
        [data] = open_train_data(alone).values()
        assert len(data.dataset) == count
