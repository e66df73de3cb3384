"""Joint groups in a run's file: what their tasks take from them, and what is refused when the file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.run_files import save_config
from allinone_ds.run_config.schema import RunConfig, load_config
from tests.joint_set import joint_run, label_sources


def read(tmp_path: Path, content: dict[str, Any], *overrides: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return load_config(tmp_path / "run.yaml", overrides)


def test_tasks_take_their_images_from_the_group(tmp_path: Path) -> None:
    content = joint_run(tmp_path, micro_steps=2, augment=["RandomHorizontalFlip"])
    content["tasks"]["alone"] = {
        "type": "classification",
        "image_size": 64,
        "batch_size": 5,
        "train": {**label_sources()["cls"], "images": "train/images"},
    }
    config = read(tmp_path, content)
    assert list(config.images) == ["alone", "rooms"] and config.step_images == 5 + 2 * 3  # yaml sorts its keys
    assert [config.tasks[name].batch_size for name in ("seg", "alone")] == [3, 5]
    assert config.tasks["det"].image_size == (32, 32) and config.tasks["det"].in_group
    assert config.tasks["det"].train_source.task == "det"  # type: ignore[attr-defined]
    save_config(config, tmp_path)
    again = load_config(tmp_path / "config.yaml")
    assert (
        again == config and "batch_size" not in yaml.safe_load((tmp_path / "config.yaml").read_text())["tasks"]["seg"]
    )
    assert read(tmp_path, content, "joint.rooms.batch_size=7").tasks["seg"].batch_size == 7


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["joint.rooms.tasks=[seg,det,cls,seg]"], "joint.rooms.tasks: 'seg' is listed twice"),
        (["joint.rooms.tasks=[seg,det,cls,deth]"], "'deth' is not defined in 'tasks'; did you mean 'det'?"),
        (["joint.rooms.tasks=[seg,det]"], "'tasks.cls.image_size' is missing"),
        (["tasks.seg.batch_size=2"], "tasks.seg.batch_size: the task belongs to joint.rooms, whose images it reads"),
        (["tasks.seg.train={format: coco}"], "tasks.seg.train: the task belongs to joint.rooms"),
        (["joint.rooms.batch_size=null"], "joint.rooms.batch_size"),
        (["tasks.seg.lora={}"], "tasks.seg.lora: the task belongs to joint.rooms, whose tasks share one forward"),
        (["joint.rooms.at=heads"], "joint.rooms.at"),
        (["joint.rooms.labels={}"], "unknown key 'joint.rooms.labels'"),
        (["joint.rooms.train.labels.seg=null"], "joint.rooms: a source has no labels of 'seg'; add labels.seg to it"),
        (["joint.rooms.train.format=coco"], "format is 'coco'"),
        (["joint.rooms.train.labels.seg.format=joint"], "format is 'joint'"),
        (["joint.rooms.augment=[Mosaic]"], "Mosaic supports only detection and segmentation, the data is joint"),
        (["joint.rooms.augment=[RandAugment]"], "for the task 'seg': augment[0]: RandAugment supports only"),
        (["joint.rooms.split={test: 0.2}"], "'test' and 'split' are both set"),
        (["balancer.norm=delayed"], "joint.rooms: a joint group needs norm='exact' and parallel='data'"),
        (["balancer.norm=sketch"], "joint.rooms: a joint group needs norm='exact' and parallel='data'"),
        (["balancer.parallel=tasks"], "joint.rooms: a joint group needs norm='exact' and parallel='data'"),
        (["joint.rooms.at=features", "balancer.name=task_clip"], "joint.rooms.at = 'features': TaskClip"),
        (["epochs={room: 3}", "trainer.max_steps=null"], "epochs.room: the run has no such task; did you mean 'rooms'"),
        (["epochs={seg: 3}", "trainer.max_steps=null"], "epochs.seg: the run has no such task"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as failed:
        read(tmp_path, joint_run(tmp_path), *overrides)
    assert says in str(failed.value), str(failed.value)


def test_a_task_of_a_base_is_dropped(tmp_path: Path) -> None:
    labels = [f"joint.rooms.{part}.labels.det=null" for part in ("train", "test")]
    config = read(tmp_path, joint_run(tmp_path), "tasks.det=null", "joint.rooms.tasks=[seg,cls]", *labels)
    assert list(config.images) == ["rooms"] and sorted(config.tasks) == ["cls", "seg"]
    assert sorted(config.joint["rooms"].train.labels) == ["cls", "seg"]  # type: ignore[attr-defined]


def test_labels_for_exactly_the_tasks_of_the_group(tmp_path: Path) -> None:
    content = joint_run(tmp_path)
    sources = [content["joint"]["rooms"][part] for part in ("train", "test")]
    moved = sources[1]["labels"].pop("det")
    with pytest.raises(ConfigError, match=r"joint.rooms: a source has no labels of 'det'; add labels.det to it"):
        read(tmp_path, content)
    sources[1]["labels"]["dets"] = moved
    with pytest.raises(ConfigError, match=r"labels of 'dets', which is no task of the group; did you mean 'det'"):
        read(tmp_path, content)


def test_a_task_belongs_to_one_group_and_names_differ(tmp_path: Path) -> None:
    content = joint_run(tmp_path)
    content["joint"]["halls"] = {**content["joint"]["rooms"], "tasks": ["det"]}
    with pytest.raises(ConfigError, match=r"'det' is also a task of joint.(rooms|halls); a task belongs to one group"):
        read(tmp_path, content)
    content = joint_run(tmp_path)
    content["joint"]["seg"] = content["joint"].pop("rooms")
    with pytest.raises(ConfigError, match=r"joint.seg: a task has this name too"):
        read(tmp_path, content)
