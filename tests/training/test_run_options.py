"""Options of a run's file that change what is trained: freezing, rates per task, length, early stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.launcher import run_ranks

SCRIPT = Path(__file__).with_name("ranks_train.py")
NO_TESTS = [f"tasks.{name}.test=null" for name in ("det", "seg", "cls")] + ["trainer.eval_strategy=no"]
ONE_TASK = ["tasks.seg=null", "tasks.cls=null", "tasks.det.test=null", "trainer.eval_strategy=no"]
Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def run(name: str, *overrides: str, ranks: int = 2) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("ranks")
        return run_ranks(SCRIPT, ranks, folder, str(home / "tiny.yaml"), f"output_dir={home / name}", *overrides)

    run("first", *NO_TESTS, "trainer.max_steps=1", "trainer.save_strategy=no")
    return run


def weights(run: Path, part: str = "") -> dict[str, Tensor]:
    return {name: value for name, value in load_file(run / "model.safetensors").items() if name.startswith(part)}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 1), (3, 2)])
def test_a_frozen_backbone_stays_and_each_head_trains_as_alone(
    train: Train, home: Path, stage: int, ranks: int
) -> None:
    """Also with a weighting that scales: without shared weights there is nothing to balance."""
    common = [f"model.start_from={home / 'first'}", "model.freeze=backbone", "trainer.max_steps=3"]
    common += ["trainer.save_strategy=no", f"deepspeed.zero_optimization.stage={stage}", "trainer.seed=5"]
    train(f"joint{stage}", *common, *NO_TESTS, "balancer.max_norm=0.001", ranks=ranks)
    train(f"alone{stage}", *common, *ONE_TASK, ranks=ranks)
    joint, alone, first = weights(home / f"joint{stage}"), weights(home / f"alone{stage}"), weights(home / "first")
    for name in (n for n in joint if n.startswith("backbone.")):
        assert torch.equal(joint[name], first[name]) and torch.equal(alone[name], first[name])
    part = "tasks.det."
    assert same(weights(home / f"joint{stage}", part), weights(home / f"alone{stage}", part), 1e-6)
    moved = [name for name in alone if name.startswith(part) and not torch.equal(alone[name], first[name])]
    assert len(moved) > 5
    events = (home / f"joint{stage}" / "log.jsonl").read_text()
    assert "nothing to balance" in events


@pytest.mark.parametrize("stage", [2, 3])
def test_a_partly_frozen_backbone_trains_the_rest_and_resumes(train: Train, home: Path, stage: int) -> None:
    options = ["model.freeze=1", "tasks.det.lr_factor=0.5", "tasks.seg.weight_decay=0.4", "trainer.ema_decay=0.5"]
    options += [*NO_TESTS, f"deepspeed.zero_optimization.stage={stage}", f"model.start_from={home / 'first'}"]
    options += ["balancer.max_norm=0.01"]
    train(f"part{stage}", *options)
    first, part = weights(home / "first"), weights(home / f"part{stage}")
    for name in (n for n in part if n.startswith("backbone.")):
        frozen = ".embeddings." in name or ".layer.0." in name
        assert torch.equal(part[name], first[name]) == frozen or name.endswith("mask_token"), name
    checkpoint = home / f"part{stage}" / "checkpoint-2"
    train(f"again{stage}", *options, f"trainer.resume_from_checkpoint={checkpoint}")
    for folder in ("", "ema"):
        assert same(weights(home / f"again{stage}" / folder), weights(home / f"part{stage}" / folder))


def test_the_factor_of_a_task_multiplies_its_rate(train: Train, home: Path) -> None:
    common = [f"model.start_from={home / 'first'}", "model.freeze=backbone", *ONE_TASK, "trainer.save_strategy=no"]
    train("factor", *common, "tasks.det.lr_factor=0.5", "tasks.det.weight_decay=0.2", ranks=1)
    train("rate", *common, "trainer.learning_rate=5e-4", "trainer.weight_decay=0.2", ranks=1)
    assert same(weights(home / "factor"), weights(home / "rate"))


def test_epochs_set_the_length_and_early_stopping_ends_it(train: Train, home: Path) -> None:
    options = ["tasks.cls=null", "tasks.det=null", "epochs={seg: 2}", "trainer.max_steps=null", "trainer.eval_steps=1"]
    options += ["trainer.save_steps=1", "trainer.load_best_model_at_end=true", "trainer.learning_rate=0"]
    metrics = train("stopped", *options, "early_stopping={patience: 3}")
    begin = json.loads((home / "stopped" / "log.jsonl").read_text().splitlines()[0])
    assert begin["max_steps"] == 12  # 24 samples, 2 per rank and step, 2 ranks
    assert metrics["steps"] == 4 and metrics["best_step"] == 1  # weights that do not move never improve
    resumed = ["trainer.resume_from_checkpoint=" + str(home / "stopped" / "checkpoint-2")]
    assert train("counted", *options, *resumed, "early_stopping={patience: 3}")["steps"] == 4
