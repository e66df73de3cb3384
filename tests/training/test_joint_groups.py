"""Joint groups in the trainer: equal to separate blocks of the same images, resumed bit for bit, mixed with tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.joint_set import joint_run, make_joint_set, separate_run
from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_train.py")
Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("joint")
    make_joint_set(home / "data")
    (home / "joint.yaml").write_text(yaml.safe_dump(joint_run(home)))
    (home / "separate.yaml").write_text(yaml.safe_dump(separate_run(home)))
    train(home, "first", "trainer.max_steps=1", config="separate")
    return home


def train(folder: Path, name: str, *overrides: str, config: str = "joint", ranks: int = 1) -> dict[str, Tensor]:
    """Train a run; return its weights."""
    own = folder / f"{name}-files"
    own.mkdir()
    run_ranks(SCRIPT, ranks, own, str(folder / f"{config}.yaml"), f"output_dir={folder / name}", *overrides)
    return load_file(folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def separate(folder: Path) -> dict[str, Tensor]:
    return train(folder, "separate", f"model.start_from={folder / 'first'}", config="separate")


NO_TEST = "joint.rooms.test=null"


@pytest.mark.parametrize(
    ("stage", "ranks", "batch_size", "micro_steps"),
    [(2, 1, 12, 1), (0, 2, 2, 3), (1, 2, 3, 2), (3, 2, 1, 6)],
)
def test_a_group_equals_separate_blocks_of_the_same_images(
    folder: Path, separate: dict[str, Tensor], stage: int, ranks: int, batch_size: int, micro_steps: int
) -> None:
    """Also with images that lack labels, so that micro-batches have none of a task, and with any division of them."""
    sizes = [f"joint.rooms.batch_size={batch_size}", f"joint.rooms.micro_steps={micro_steps}"]
    engine = f"deepspeed.zero_optimization.stage={stage}"
    start = f"model.start_from={folder / 'first'}"  # ZeRO-3 draws other initial weights
    found = train(folder, f"joint-{stage}-{ranks}", *sizes, engine, NO_TEST, start, ranks=ranks)
    for key, value in separate.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)


def test_a_group_at_the_features_equals_one_at_the_backbone_where_nothing_is_scaled(folder: Path) -> None:
    """With the plain sum, also on ZeRO-3, where the group is evaluated too."""
    sizes = ["joint.rooms.batch_size=2", "joint.rooms.micro_steps=3", "balancer.name=sum"]
    start = f"model.start_from={folder / 'first'}"
    expected = train(folder, "sum", *sizes, "joint.rooms.micro_steps=6", NO_TEST, start)
    engine = "deepspeed.zero_optimization.stage=3"
    found = train(folder, "features", *sizes, engine, "joint.rooms.at=features", start, ranks=2)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)
    metrics = json.loads((folder / "features" / "metrics.json").read_text())
    assert [metrics[f"eval_{task}_samples"] for task in ("seg", "det", "cls")] == [5, 5, 5]
    [*_, last] = [json.loads(line) for line in (folder / "features" / "log.jsonl").read_text().splitlines()
                  if '"loss/det"' in line]  # fmt: skip
    assert all(last[f"grad_norm/{task}/raw"] > 0 for task in ("seg", "det", "cls"))


def test_a_run_of_a_group_and_a_task_resumes_bit_for_bit(folder: Path) -> None:
    content = joint_run(folder, augment=["RandomHorizontalFlip", {"RandomCrop": {"size": [40, 48]}}])
    own = {"format": "image_list", "images": "train/images", "list": "train/list.txt"}
    content["tasks"]["alone"] = {"type": "classification", "image_size": 32, "batch_size": 2, "train": own}
    content["trainer"] |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    content["trainer"] |= {"eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.5}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(content))
    whole = train(folder, "mixed", config="mixed", ranks=2)
    checkpoint = folder / "mixed" / "checkpoint-2"
    again = train(folder, "again", f"trainer.resume_from_checkpoint={checkpoint}", config="mixed", ranks=2)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    metrics = json.loads((folder / "mixed" / "metrics.json").read_text())
    assert [metrics[f"eval_{task}_samples"] for task in ("seg", "det", "cls")] == [5, 5, 5]
    assert 0 < metrics["eval_score"] < 1
    pictures = {file.name.rsplit("-", 1)[0] for file in (folder / "mixed" / "predictions").iterdir()}
    worst = {file.name.rsplit("-", 1)[0] for file in (folder / "mixed" / "worst").iterdir()}
    assert pictures == {"rooms"} and worst == {"seg", "det", "cls"}
    lines = [json.loads(line) for line in (folder / "mixed" / "log.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "loss/alone" in line)
    assert all(f"{name}/{task}" in logged for name in ("loss", "epoch", "images_per_second")
               for task in ("seg", "det", "cls", "alone"))  # fmt: skip


def test_a_step_without_any_label_changes_nothing(folder: Path) -> None:
    """One image per step; two of four images have no label."""
    content = joint_run(folder, tasks=["seg", "cls"], batch_size=1, test=None)
    content["joint"]["rooms"]["train"] = {"format": "class", "dataset": "tests.joint_set:Gaps"}
    del content["tasks"]["det"], content["tasks"]["seg"]["classes"]
    content["trainer"] |= {"max_steps": 4}
    (folder / "gaps.yaml").write_text(yaml.safe_dump(content))
    assert all(torch.isfinite(value).all() for value in train(folder, "gaps", config="gaps").values())
    lines = [json.loads(line) for line in (folder / "gaps" / "log.jsonl").read_text().splitlines()]
    labelled = [isinstance(line.get("loss/cls"), float) for line in lines if "images_per_second/cls" in line]
    assert sorted(labelled) == [False, False, True, True]
