"""What predictors reach that do not look at the image."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from allinone_ds.data.base import Sample
from allinone_ds.data.demo import JointSizes, make_joint_demo_data
from allinone_ds.data.joint.batches import by_task
from allinone_ds.evaluation.constant import _CONSTANTS, constant_metrics
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.model import AllInOneModel
from allinone_ds.run_config.build import build_model, classes_of, open_test_data, open_train_data
from allinone_ds.run_config.run_files import ModelFacts
from allinone_ds.run_config.schema import RunConfig, load_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The joint demo on a few scenes."""
    root = make_joint_demo_data(tmp_path_factory.mktemp("joint"), sizes=JointSizes(train=24, test=8), progress=False)
    return load_config("configs/runs/demo_joint.yaml", [f"data_root={root}"])


def test_every_task_of_the_joint_demo_has_a_constant(config: RunConfig) -> None:
    train = open_train_data(config)
    classes = classes_of(train)
    model: AllInOneModel = build_model(config, ModelFacts(backbone=config.model.backbone, classes=classes))
    tasks, learned, tested = tasks_of(model), by_task(train), by_task(open_test_data(config, classes))
    found = {name: constant_metrics(task, learned[name].dataset, tested[name].dataset) for name, task in tasks.items()}
    assert set(found) == set(config.tasks) and all(found[name][tasks[name].main_metric] <= 1 for name in found)

    counts = torch.stack([learned["count"].dataset[i]["value"] for i in range(24)])
    truth = torch.stack([tested["count"].dataset[i]["value"] for i in range(8)])
    assert found["count"]["mae"] == pytest.approx(float((truth - counts.mean()).abs().mean()))
    masks = torch.stack([tested["segmentation"].dataset[i]["mask"].as_subclass(Tensor) for i in range(8)])
    known = masks != 255
    background = float((masks[known] == 0).sum() / known.sum())
    present = len(masks[known].unique())
    assert found["segmentation"]["miou"] == pytest.approx(background / present, abs=1e-4)
    assert found["depth"]["rmse"] < 3 and found["detection"]["map50"] < 0.2


def test_the_data_of_the_demo_has_no_fault(config: RunConfig) -> None:
    for part in (open_train_data(config), open_test_data(config, classes_of(open_train_data(config)))):
        assert not [p for data in part.values() for p in data.dataset.structural if p.level == "error"]
        assert Path(part["scenes"].dataset.path(0)).is_file()


def test_boxes_and_points_of_images_of_different_sizes_are_averaged_as_parts_of_them() -> None:
    """A point without a label does not count."""

    def sample(size: int, x: float, seen: int) -> Sample:
        box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size
        points = torch.tensor([[[x, 0.5]]]) * size
        return {"image": torch.zeros(3, size, size), "boxes": box, "labels": torch.tensor([0]), "keypoints": points,
                "visible": torch.tensor([[seen]])}  # fmt: skip

    learned = [sample(40, 0.4, 2), sample(80, 0.6, 1), sample(200, 0.0, 0)]
    (of_box,), (of_points,) = (_CONSTANTS[kind](SimpleNamespace(), learned) for kind in ("detection", "keypoints"))
    assert of_box(sample(100, 0, 2))["boxes"].tolist() == [[25, 25, 75, 75]]
    torch.testing.assert_close(of_points(sample(100, 0, 2))["keypoints"], torch.tensor([[[50.0, 50.0]]]))
