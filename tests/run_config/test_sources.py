"""The data of a task in the YAML file: a source, a list of sources, a split, and classes that are given once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from allinone_ds.data.demo import DemoSizes, make_demo_data
from allinone_ds.errors import ConfigError
from allinone_ds.run_config.build import open_test_data, open_train_data
from allinone_ds.run_config.run_files import save_config
from allinone_ds.run_config.schema import load_config, read_config
from tests.tiny_run import tiny_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    return path


def laid_over(file: Path, **keys: object) -> Path:
    """A file that changes keys of the task `cls`."""
    above = file.with_name("above.yaml")
    above.write_text(yaml.safe_dump({"base": str(file), "tasks": {"cls": keys}}))
    return above


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": {"test": 0.2}}, "'test' and 'split' are both set; remove one"),
        ({"split": {"test": 1.0}, "test": None}, r"tasks.cls.split.test' = 1.0"),
        ({"split": {"tst": 0.1}, "test": None}, "unknown key 'tasks.cls.split.tst'; did you mean 'test'"),
        ({"train": {"weight": 2}}, "tasks.cls: train.weight = 2, but there is no second source; remove it"),
        ({"test": {"weight": 2}}, "tasks.cls: test: 'weight' has no effect"),
        ({"train": []}, r"'tasks.cls.train' = \[\]: List should have at least 1 item"),
    ],
)
def test_keys_without_effect_are_refused(file: Path, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(laid_over(file, **keys))


def test_mistakes_in_a_list_of_sources_are_named(file: Path) -> None:
    source = tiny_run(file.parent)["tasks"]["cls"]["train"]
    wrong = [
        ({**source, "image": "x"}, "unknown key 'tasks.cls.train.1.image_list.image'; did you mean 'images'"),
        ({**source, "format": "image_lists"}, "tasks.cls.train.1.*did you mean 'image_list'"),
        ({**source, "weight": 0}, "tasks.cls.train.1.image_list.weight' = 0"),
    ]
    for second, message in wrong:
        with pytest.raises(ConfigError, match=message):
            load_config(laid_over(file, train=[source, second]))


def test_a_list_of_sources_replaces_a_source_of_the_base_and_the_reverse(file: Path) -> None:
    source = tiny_run(file.parent)["tasks"]["cls"]["train"]
    above = laid_over(file, train=[source, {**source, "weight": 3.0}])
    assert [s.weight for s in load_config(above).tasks["cls"].train] == [1.0, 3.0]
    last = file.with_name("last.yaml")
    last.write_text(yaml.safe_dump({"base": str(above), "tasks": {"cls": {"train": source}}}))
    assert load_config(last) == load_config(file)


def test_sources_split_and_classes_are_opened_and_written_down(file: Path, tmp_path: Path) -> None:
    make_demo_data(
        tmp_path / "data",
        sizes=DemoSizes(detection=(3, 3), segmentation=(3, 3), classification=(20, 8)),
        progress=False,
    )
    content = tiny_run(tmp_path)
    tasks = content["tasks"]
    del tasks["cls"]["test"], tasks["cls"]["train"]["classes"], tasks["seg"]["train"]["classes"]
    del tasks["seg"]["test"]["classes"]
    second = {**tasks["cls"]["train"], "images": "classification/test", "list": "classification/test.txt", "weight": 2}
    tasks["cls"].update(
        train=[tasks["cls"]["train"], second], split={"test": 0.5, "seed": 1}, classes="classification/classes.txt"
    )
    names = (tmp_path / "data" / "segmentation" / "classes.txt").read_text().split("\n")
    tasks["seg"]["classes"] = [name for name in names if name]
    file.write_text(yaml.safe_dump(content))
    config = load_config(file)
    train = open_train_data(config)
    classes = {name: data.dataset.classes for name, data in train.items()}
    test = open_test_data(config, classes)
    assert len(train["cls"].dataset) + len(test["cls"].dataset) == 28
    assert {s["path"] for s in train["cls"].dataset}.isdisjoint(s["path"] for s in test["cls"].dataset)
    assert (
        classes["cls"] == test["cls"].dataset.classes == config.tasks["cls"].train_source.open(config.data_root).classes
    )
    assert classes["seg"] == tasks["seg"]["classes"] == test["seg"].dataset.classes
    assert load_config(save_config(config, tmp_path)) == config


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"ignore_index": "foo"}, "'foo': give a whole number, or a list of such numbers"),
        ({"class_ids": [0, [1, -2]]}, "[1, -2]: give a whole number of 0 or more, or a list of such numbers"),
    ],
)
def test_a_mistake_in_a_source_is_one_line_where_its_format_names_a_key_too(file: Path, keys: dict, says: str) -> None:
    """`label_maps` is a format and one of its keys; removing the wrong key for it gave three more messages."""
    source = {"format": "label_maps", "images": "i", "label_maps": "m", **keys}
    (file.with_name("above.yaml")).write_text(yaml.safe_dump({"base": str(file), "tasks": {"seg": {"train": source}}}))
    _, mistakes = read_config(file.with_name("above.yaml"))
    assert len(mistakes) == 1 and says in mistakes[0], mistakes
