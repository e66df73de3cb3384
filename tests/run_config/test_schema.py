"""The YAML file of a run is read strictly, and is the same after it was saved and read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.arguments import check_trainer_keys
from allinone_ds.run_config.run_files import save_config
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_config.yaml_files import find_config, read_deepspeed, read_yaml
from tests.tiny_run import tiny_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modell=1", "did you mean 'model'"),
        ("tasks.det.batchsize=2", "did you mean 'batch_size'"),
        ("tasks.det.train.anotations=x", "annotations"),
        ("model.backbone.stemm=conv", "did you mean 'stem'"),
        ("tasks.det.batch_size=0", "tasks.det.batch_size"),
        ("tasks.det.image_size=[32,32,32]", "tasks.det.image_size"),
        ("deepspeed=configs/deepspeed/zero9.json", "zero2.json"),
        ("tasks.cls.augment=[RandomHorizontalFlop]", "tasks.cls.augment: augment[0]: there is no augmentation"),
        ("tasks.cls.augment=[Mosaic]", "Mosaic supports only detection and segmentation, the data is classification"),
        ("tasks.det.augment=configs/augment/detektion.yaml", "configs/augment/detection.yaml"),
        ("tasks.dett.batch_size=2", "the run has no task 'dett'; did you mean 'det'? allowed: cls, det, seg"),
        ("tasks.seg.test_time.scales=[0]", "tasks.seg.test_time.scales.0"),
    ],
)
def test_mistakes_are_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + re.escape(message)):
        load_config(file, [override])


ZERO0 = "deepspeed.zero_optimization.stage=0"
ZERO3 = "deepspeed=configs/deepspeed/zero3.json"
APART = {"parallel": "tasks"}


@pytest.mark.parametrize(
    ("balancer", "override", "message"),
    [
        ({"name": "tbcg"}, "", "balancer.name: unknown weighting 'tbcg'; did you mean 'tbgc'"),
        ({"name": "tbgc", "maxnorm": 1}, "", "balancer.maxnorm: 'tbgc' has no such option; did you mean 'max_norm'"),
        ({"max_norm": "abc"}, "", "balancer.max_norm = 'abc'"),
        ({"max_norm": -1}, "", "max_norm = -1"),
        ({"norm": "skech"}, "", "norm = 'skech'; did you mean 'sketch'"),
        ({"norm": "exact", "sketch_size": 64}, "", "sketch_size = 64 with norm = 'exact'"),
        ({"cosines_every": -1}, "", "cosines_every = -1"),
        ({"parallel": "task"}, "", "parallel = 'task'; did you mean 'tasks'"),
        ({"target": "max"}, "", "never scales a gradient"),
        ({"name": "static", "weights": {"det": 1, "seg": 1}}, "", "no weight for task 'cls'"),
        ({"name": "static", "weights": {"det": 1, "seg": 1, "cls": 1, "dett": 1}}, "", "did you mean 'det'"),
        ({"name": "mgda", "norm": "sketch"}, "", "must see every task before it scales one"),
        ({"norm": "delayed", **APART}, "", "norm='delayed' with parallel='tasks'"),
        ({"norm": "sketch"}, ZERO0, "norm='sketch' cannot run on this engine (ZeRO stage 0)"),
        ({"norm": "delayed"}, ZERO0, "norm='delayed' cannot run on this engine"),
        (APART, ZERO3, "parallel='tasks' cannot run on ZeRO-3"),
        ({"groups": {"det": 1, "seg": 1, "cls": 1}}, "", "groups are for parallel='tasks'"),
        ({"groups": {"dett": 1, "seg": 1, "cls": 1}, **APART}, "", "unknown task 'dett'; did you mean 'det'"),
        ({"groups": {"det": 1, "seg": 1}, **APART}, "", "no ranks for task(s) cls"),
        ({"groups": {"det": [0, 1], "seg": [1], "cls": [2]}, **APART}, "", "rank 1"),
    ],
)
def test_a_balancer_that_cannot_run_is_refused(file: Path, balancer: dict, override: str, message: str) -> None:
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "balancer": balancer}))
    with pytest.raises(ConfigError, match="(?s)" + re.escape(f"{file}: ") + ".*" + re.escape(message)):
        load_config(file, [override] if override else [])


@pytest.mark.parametrize(
    "balancer",
    [
        {"name": "static", "weights": {"det": 1.0, "seg": 0.5, "cls": 2.0}},
        {"name": "tbgc", "max_norm": 0.2, "norm": "sketch", "sketch_size": 4096, "cosines_every": 10},
        {"name": "gradnorm", "groups": {"det": [0], "seg": [1], "cls": [0]}, **APART},
    ],
)
def test_a_balancer_reads_back_equal(file: Path, tmp_path: Path, balancer: dict) -> None:
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "balancer": balancer}))
    config = load_config(file)
    again = load_config(save_config(config, tmp_path))
    assert again.balancer == config.balancer and repr(again.balancer.weighting()) == repr(config.balancer.weighting())
    assert {key: value for key, value in again.balancer.model_dump().items() if key in balancer} == balancer


def test_overrides_may_add_a_whole_task(file: Path) -> None:
    content = yaml.safe_load(file.read_text())["tasks"]["cls"]
    added = [f"tasks.more.{key}={content[key]}" for key in ("type", "image_size", "batch_size")]
    added += [f"tasks.more.train.{key}={value}" for key, value in content["train"].items()]
    assert set(load_config(file, added).tasks) == {"det", "seg", "cls", "more"}


@pytest.mark.parametrize(
    "address",
    ["https://me:s3cr3t@host/x.zip", "https://host/x?access_token=s3cr3t", "https://host/x?a=1&X-Amz-Signature=s3cr3t"],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(file: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="tasks.det.train.images is an address with") as error:
        load_config(file, [f"tasks.det.train.images={address}"])
    assert "s3cr3t" not in str(error.value)
    read_yaml(file, ["tasks.det.train.images=https://host:80/x?a=1"])
    with pytest.raises(ConfigError, match="trainer.report_to is an address with"):
        read_yaml(file, [f"trainer.report_to=[wandb,{address}]"])


def test_the_word_no_survives_yaml() -> None:
    assert check_trainer_keys({"save_strategy": False}) == {"save_strategy": "no"}


def test_overrides_reach_into_the_file_and_into_the_deepspeed_file(file: Path) -> None:
    config = load_config(
        file, ["trainer.max_steps=50", "deepspeed.zero_optimization.stage=1", "tasks.seg.image_size=64"]
    )
    assert config.trainer["max_steps"] == 50
    assert config.tasks["seg"].image_size == (64, 64)
    assert isinstance(config.deepspeed, dict) and config.deepspeed["zero_optimization"]["stage"] == 1
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        read_yaml(file, ["--steps"])


def test_branches_come_from_a_file_and_are_written_down(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["tasks.det.augment=configs/augment/detection.yaml"])
    assert {name: branch.probability for name, branch in config.tasks["det"].augment.branches.items()} == {
        "hard": 0.8,
        "easy": 0.2,
    }
    assert load_config(save_config(config, tmp_path)) == config
    assert "Mosaic" in (tmp_path / "config.yaml").read_text()  # the run's folder needs no other file


def test_the_resolved_file_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["trainer.learning_rate=3e-4"])
    assert load_config(save_config(config, tmp_path)) == config


def test_a_run_based_on_a_resumed_one_does_not_look_for_a_checkpoint(file: Path, tmp_path: Path) -> None:
    written = save_config(load_config(file, ["trainer.resume_from_checkpoint=true"]), tmp_path)
    assert load_config(written) == load_config(file)


def test_shipped_deepspeed_files_never_clip() -> None:
    for stage in (1, 2, 3):
        for kind in ("", "_bf16"):
            content = read_deepspeed(f"configs/deepspeed/zero{stage}{kind}.json")
            assert content["gradient_clipping"] == 0.0
            assert content["zero_optimization"]["stage"] == stage


def test_shipped_runs_are_valid() -> None:
    for name in ("demo", "demo_full", "traffic_8gpu", "traffic_64gpu"):
        config = load_config(find_config(f"configs/runs/{name}.yaml"))
        assert check_trainer_keys(config.trainer)["max_steps"] > 0


def test_a_file_is_laid_over_its_base(file: Path, tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump({"base": str(file), "trainer": {"learning_rate": 5e-4}}))
    last = tmp_path / "last.yaml"
    last.write_text(yaml.safe_dump({"base": str(tmp_path / "middle.yaml"), "name": "last"}))
    assert load_config(last) == load_config(file, ["trainer.learning_rate=5e-4", "name=last"])
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump({"base": str(last)}))
    with pytest.raises(ConfigError, match="base leads back to"):
        load_config(last)
    last.write_text("base: nowhere.yaml")
    with pytest.raises(ConfigError, match="no configuration file 'nowhere.yaml'"):
        load_config(last)
