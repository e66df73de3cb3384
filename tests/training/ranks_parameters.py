"""Runs that train parts of their parameters, or train them differently, on two ranks. Started by test_parameters.py."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from allinone_ds.distributed import barrier, rank
from allinone_ds.errors import ConfigError
from allinone_ds.run_config.schema import load_config
from allinone_ds.training import run
from tests.launcher import run_checks

HOME = Path(sys.argv[2])
SHORT = ["trainer.eval_strategy=no", "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.ema_decay=0.5",
         "balancer.max_norm=0.01", "trainer.weight_decay=0.1"]  # fmt: skip
THAW = ["model.freeze=backbone", "model.thaw={2: 1, 3: null}"]


def trained(name: str, *overrides: str, stage: int = 2, after: Path | None = None) -> Path:
    """Train the tiny run, from a checkpoint if one is given; return its folder."""
    folder = HOME / name
    given = [f"output_dir={folder}", f"deepspeed.zero_optimization.stage={stage}", *SHORT, *overrides]
    if after is not None:
        if rank() == 0:
            shutil.copytree(after, folder / after.name)
        barrier()
        given.append("trainer.resume_from_checkpoint=true")
    run.train_run(load_config(HOME / "tiny.yaml", given))
    barrier()
    return folder


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def events(folder: Path, kind: str) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["message"]) for line in lines if line["event"] == kind]


def averages(folder: Path, step: int) -> list[Tensor]:
    files = sorted((folder / f"checkpoint-{step}").glob("ema_rank_*"))
    return [shard for file in files for shard in torch.load(file, weights_only=True)["shards"]]


def history(folder: Path, key: str, step: int = 4) -> list[float]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if "loss" in entry]


@cache
def thawed(stage: int) -> Path:
    """A run whose backbone is frozen for two steps, and its first layer for three."""
    return trained(f"thawed{stage}", *THAW, stage=stage)


def check_thaw(stage: int) -> None:
    """What is frozen stands still, trains from its step on, and a resume before or at a thaw changes nothing."""
    whole = thawed(stage)
    steps = {step: weights(whole, step) for step in (1, 2, 3, 4)}
    for name in (n for n in steps[1] if n.startswith("backbone.") and not n.endswith("mask_token")):
        moved = [not torch.equal(steps[step][name], steps[step + 1][name]) for step in (1, 2, 3)]
        first = ".embeddings." in name or ".layer.0." in name
        assert moved == [False, not first, True], (name, moved)
    assert all(not torch.equal(steps[1][name], steps[2][name]) for name in steps[1] if name.endswith("cls_head.weight"))
    assert history(whole, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for begin in (1, 2) if stage > 1 else (1,):  # before and at a thaw
        again = trained(f"again{stage}from{begin}", *THAW, stage=stage, after=whole / f"checkpoint-{begin}")
        found = weights(again, 4)
        assert all(torch.equal(found[name], value) for name, value in steps[4].items())
        if rank() == 0:
            pairs = zip(averages(again, 4), averages(whole, 4), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    if rank() == 0:
        assert [step for step, _ in events(whole, "note") if _.startswith("model.thaw")] == [2, 3]
        assert [step for step, text in events(whole, "warning") if "nothing to balance" in text] == [0]


def check_thaw_across_stages() -> None:
    """The stages agree, and a checkpoint from before the thaw resumes on another stage."""
    expected = weights(thawed(1), 4)
    found = weights(trained("resharded", *THAW, stage=3, after=thawed(2) / "checkpoint-1"), 4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)
    with pytest.raises(
        ConfigError, match="was saved with the stages .'backbone', 1, None., this run has .'backbone', No"
    ):
        trained("other", "model.freeze=backbone", "model.thaw={2: null}", after=thawed(2) / "checkpoint-1")


if __name__ == "__main__":
    run.finish_run = lambda trainer, metrics: None  # no evaluation, plots and pages
    checks = {f"check_thaw {stage}": partial(check_thaw, stage) for stage in (0, 1, 2, 3)}
    checks |= {name: value for name, value in globals().items() if name == "check_thaw_across_stages"}
    wanted = sys.argv[3:]
    run_checks({n: c for n, c in checks.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
