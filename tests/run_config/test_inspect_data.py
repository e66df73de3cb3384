"""A run does not start on data from which nothing can be learned, or that it is tested on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allinone_ds import cli
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.run_config.build import inspect_data, open_test_data, open_train_data
from allinone_ds.run_config.schema import RunConfig, load_config


def inspected(config: RunConfig) -> list[str]:
    """Return the warnings of the training data and of the test data of the task det."""
    train = open_train_data(config)
    test = open_test_data(config, {name: list(data.dataset.classes) for name, data in train.items()})
    inspect_data(config, train, test)
    return [str(p) for part in (train, test) for p in part["det"].dataset.structural]


def test_the_data_of_the_demo_is_complete_but_for_a_class(home: Path) -> None:
    [warning] = inspected(load_config(home / "tiny.yaml", ["tasks.det.image_size=128"]))
    assert "no box has category dress (1 of 10)" in warning


def test_test_data_that_equals_the_training_data_ends_the_start_and_the_check(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["tasks.det.test.images=detection/train", "tasks.det.test.annotations=detection/train.json"]
    with pytest.raises(DataError, match="task 'det': .*\n.*all 24 test images are also training images"):
        inspected(load_config(home / "tiny.yaml", same))
    assert cli.main(["check", str(home / "tiny.yaml"), *same]) == 1
    assert "error: " in (out := capsys.readouterr().out) and "all 24 test images are also training images" in out


def test_boxes_of_negative_size_end_the_start(home: Path, tmp_path: Path) -> None:
    content = json.loads((home / "data" / "detection" / "train.json").read_text())
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        record["bbox"] = [x + width, y + height, -width, -height]
    (tmp_path / "train.json").write_text(json.dumps(content))
    config = load_config(home / "tiny.yaml", [f"tasks.det.train.annotations={tmp_path}/train.json"])
    with pytest.raises(DataError, match="nothing can be learned: of [0-9]+ boxes, [0-9]+ have no area"):
        inspected(config)


def test_boxes_that_vanish_are_a_warning(home: Path) -> None:
    found = [w for w in inspected(load_config(home / "tiny.yaml", ["tasks.det.image_size=4"])) if "not used" in w]
    assert len(found) == 2  # train and test
    assert all("are smaller than 1 pixel at the image_size 4 x 4 (height x width)" in warning for warning in found)


def test_data_of_another_kind_is_refused(home: Path) -> None:
    config = load_config(home / "tiny.yaml")
    config.tasks["cls"].train = config.tasks["det"].train
    with pytest.raises(ConfigError, match="tasks.cls.train: the data is for detection, the task is a classification"):
        open_train_data(config)
