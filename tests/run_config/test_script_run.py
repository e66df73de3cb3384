"""The folder of a script's run: config.yaml and model.json are made from the objects given to the Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import v2

import allinone_ds
from allinone_ds import TBGC, GramWeighting, Static, cli
from allinone_ds.data import Joint, PairedSource, TaskData, eval_transform, open_source, train_transform
from allinone_ds.data.augmentation.transforms import SampleTransform
from allinone_ds.data.base import SampleDataset
from allinone_ds.data.joint.batches import JointCollate
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.evaluation.evaluate import evaluate_tasks
from allinone_ds.evaluation.predictor import evaluate_run
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import Backbone, BackboneConfig, build_backbone
from allinone_ds.run_config.arguments import AllInOneArguments
from allinone_ds.run_config.schema import RunConfig, load_config
from allinone_ds.run_config.script_run import script_run_files
from allinone_ds.tasks import build_task, task_class
from allinone_ds.tasks.classification import ClassificationTask
from allinone_ds.tasks.test_time import TestTime
from tests.joint_set import CLASSES, joint_source, make_joint_set
from tests.tiny import SIZE, tiny_backbone
from tests.tiny_run import tiny_run


class Script:
    """What a script gives to the Trainer: the model, data and arguments of the tiny run, without its YAML file."""

    def __init__(self, home: Path, folder: Path, backbone: Backbone | None = None) -> None:
        torch.manual_seed(0)
        config = RunConfig.model_validate(tiny_run(home))
        self.folder = folder
        self.train, self.test, tasks = {}, {}, {}
        trunk = backbone or tiny_backbone()
        for name, task in config.tasks.items():
            transform = train_transform(["RandomHorizontalFlip"], task.image_size)
            train = open_source(task.train, config.data_root)
            test = open_source(task.test, config.data_root, classes=train.classes)
            collate = task_class(task.type).collate
            self.train[name] = TaskData(train, transform, collate, batch_size=2, micro_steps=3)
            self.test[name] = TaskData(test, eval_transform(task.image_size), collate, batch_size=4)
            tasks[name] = build_task(task.type, name, train.classes, trunk, task.image_size, task.head, task.options)
        self.model = AllInOneModel(trunk, tasks).eval()
        self.args = AllInOneArguments(
            output_dir=str(folder), max_steps=7, learning_rate=2e-3, lr_scheduler_type="cosine", save_steps=3,
            deepspeed="configs/deepspeed/zero1.json", backbone_lr_factor=0.5,
        )  # fmt: skip
        self.weighting: Any = TBGC(max_norm=0.3)

    def write(self, **balancer: Any) -> list[str]:
        """Write the files as the Trainer and `finish_run` do; return the gaps."""
        files, gaps = script_run_files(self.model, self.args, self.train, self.test, self.weighting, balancer)
        if files is not None:
            files.on_checkpoint(self.folder)
            save_file(self.model.state_dict(), self.folder / "model.safetensors")
        return gaps


class Shades(SampleDataset):
    """A data set that only Python can open."""

    kind, classes = "classification", ["dark", "bright"]

    def __init__(self, inner: SampleDataset) -> None:
        self.inner, self.classes = inner, inner.classes

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class OwnTask(ClassificationTask):
    """A task of a module of its own."""


def test_eval_gives_what_the_script_measures(home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    script.test["seg"].test_time = TestTime(flip=True)
    assert script.write(norm="sketch") == []
    expected = evaluate_tasks(script.model, script.test, torch.device("cpu"))
    found = evaluate_run(tmp_path / "run")
    assert found == expected and set(found.tasks) == {"det", "seg", "cls"}
    config = load_config(tmp_path / "run" / "config.yaml")
    assert repr(config.balancer.weighting()) == repr(script.weighting) and config.balancer.norm == "sketch"
    assert {**config.trainer} == {
        "max_steps": 7, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "save_steps": 3, "backbone_lr_factor": 0.5
    }  # fmt: skip
    assert (config.name, config.tasks["det"].micro_steps, config.tasks["det"].eval_batch_size) == ("run", 3, 4)
    assert config.tasks["det"].augment.branches["all"].transforms == ["RandomHorizontalFlip"]
    assert cli.main(["export", str(tmp_path / "run")]) == 0
    loaded = allinone_ds.load(tmp_path / "run" / "export" / "model")
    pixels = torch.randn(1, 3, *SIZE)
    assert torch.equal(loaded.model("cls", pixels).logits, script.model("cls", pixels).logits)


def test_the_backbone_needs_no_checkpoint_any_more(home: Path, tmp_path: Path) -> None:
    tiny_backbone(stem="patch").net.save_pretrained(tmp_path / "pretrained")
    script = Script(home, tmp_path / "run", build_backbone(BackboneConfig(checkpoint=str(tmp_path / "pretrained"))))
    assert script.write() == []
    shutil.rmtree(tmp_path / "pretrained")
    pixels = torch.randn(1, 3, *SIZE)
    loaded = allinone_ds.load(tmp_path / "run")
    assert torch.equal(loaded.model("cls", pixels).logits, script.model("cls", pixels).logits)


@pytest.mark.parametrize("case", ["dataset", "transform", "root"])
def test_data_that_only_the_script_can_open_is_named(
    case: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(home, tmp_path / "run")
    data = script.test["cls"]
    if case == "dataset":
        data.dataset = Shades(data.dataset)
    elif case == "transform":
        data.transform = SampleTransform({"all": (1.0, [v2.CenterCrop(20)])}, SIZE)
    else:
        data.dataset.opened_from = (data.dataset.opened_from[0], tmp_path)  # type: ignore[index]
    assert script.write() == []
    reason = {
        "dataset": "it was not opened by allinone_ds.data.open_source",
        "transform": r"its transform is not eval_transform\(image_size\)",
        "root": "its root folder is not that of the first task",
    }[case]
    with pytest.raises(DataError, match=rf"\({type(data.dataset).__module__}.*, 11 samples\).* {reason}"):
        evaluate_run(tmp_path / "run")
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert "trainer.evaluate()" in capsys.readouterr().err
    assert set(evaluate_run(tmp_path / "run", ["tasks.cls.test=null"]).tasks) == {"det", "seg"}
    allinone_ds.load(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run")]) == 0


def test_what_the_files_cannot_say_is_said(home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    script.train["seg"].transform = lambda sample: eval_transform(SIZE)(sample)
    script.weighting = GramWeighting(lambda gram: torch.ones(len(gram)))
    gaps = script.write()
    assert len(gaps) == 2
    assert "training transform of task 'seg'" in gaps[0] and "default weighting, since GramWeighting" in gaps[1]
    assert set(evaluate_run(tmp_path / "run").tasks) == {"det", "seg", "cls"}
    script.weighting = Static({"det": 1.0, "seg": 2.0, "cls": 3.0})
    assert len(script.write()) == 1
    assert load_config(tmp_path / "run" / "config.yaml").balancer.weighting().weights == script.weighting.weights


def test_a_model_that_cannot_be_built_again_has_no_files(home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    script.model.backbone.settings = None
    (gap,) = script.write()
    assert "does not come from build_backbone" in gap and not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(ConfigError, match="allinone.json"):
        allinone_ds.load(tmp_path / "run")


@pytest.mark.parametrize("module", [__name__, "__main__"])
def test_a_class_of_task_is_found_in_its_module_only(module: str, home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    backbone = script.model.backbone
    own = OwnTask(
        "cls", script.model.tasks["cls"].classes, backbone.channels, backbone.stride, backbone.num_levels, SIZE
    )
    script.model.tasks["cls"] = own
    name, OwnTask.__module__ = OwnTask.__module__, module
    try:
        gaps = script.write()
    finally:
        OwnTask.__module__ = name
    if module == "__main__":
        assert len(gaps) == 1 and "task 'cls' is defined in the script itself" in gaps[0]
        with pytest.raises(ConfigError, match="move it to a module of its own"):
            allinone_ds.load(tmp_path / "run")
    else:
        assert gaps == [] and isinstance(allinone_ds.load(tmp_path / "run").tasks["cls"], OwnTask)


def test_options_that_no_file_holds_are_named(home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    script.model.tasks["cls"].options = {"loss": torch.nn.MSELoss()}
    (gap,) = script.write()
    assert "not JSON serializable" in gap and not (tmp_path / "run" / "config.yaml").exists()


def test_no_secret_is_written(home: Path, tmp_path: Path) -> None:
    script = Script(home, tmp_path / "run")
    script.args.hub_token = script.args.push_to_hub_token = "hf_secret"  # noqa: S105
    script.write()
    assert "hf_secret" not in json.dumps(load_config(tmp_path / "run" / "config.yaml").model_dump(mode="json"))


def test_a_joint_group_of_a_script_is_evaluated_from_its_folder(tmp_path: Path) -> None:
    make_joint_set(tmp_path / "data")
    trunk = tiny_backbone()
    kinds = {"seg": "segmentation", "det": "detection", "cls": "classification"}
    content = {part: joint_source(part) for part in ("train", "test")}
    for source in content.values():
        source["labels"]["seg"]["classes"] = CLASSES["seg"]
    train = open_source(PairedSource(**content["train"]), tmp_path / "data")
    test = open_source(PairedSource(**content["test"]), tmp_path / "data", dict(train.classes_of))
    torch.manual_seed(0)
    tasks = {name: build_task(kind, name, CLASSES[name], trunk, SIZE) for name, kind in kinds.items()}
    collate = JointCollate(
        {name: task.collate for name, task in tasks.items()}, {name: task.unlabelled for name, task in tasks.items()}
    )
    joint = Joint(tuple(kinds), at="features", test_time={"seg": TestTime(flip=True)})
    script = Script.__new__(Script)
    script.folder, script.weighting = tmp_path / "run", TBGC()
    script.model = AllInOneModel(trunk, tasks).eval()
    script.args = AllInOneArguments(str(script.folder), max_steps=7, deepspeed="configs/deepspeed/zero1.json")
    transform = train_transform([], SIZE)
    script.train = {"rooms": TaskData(train, transform, collate, batch_size=2, joint=joint)}
    script.test = {"rooms": TaskData(test, eval_transform(SIZE), collate, batch_size=3, joint=joint)}
    assert script.write() == []
    config = load_config(script.folder / "config.yaml")
    assert (config.joint["rooms"].at, config.tasks["det"].batch_size, list(config.images)) == ("features", 2, ["rooms"])
    assert evaluate_run(script.folder) == evaluate_tasks(script.model, script.test, torch.device("cpu"))
