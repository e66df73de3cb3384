"""Resumes a run with other settings on one rank. Started by test_resume.py."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.schema import load_config
from allinone_ds.tasks import frequencies
from allinone_ds.training import run
from tests.launcher import run_checks

HOME = Path(sys.argv[2])
FOLDER = Path(tempfile.mkdtemp())
SHORT = ["trainer.eval_strategy=no", "tasks.seg.options.class_weights=balanced"]
NEW = ["trainer.learning_rate=2e-4", "trainer.weight_decay=0.3", "tasks.det.lr_factor=3", "trainer.adam_beta1=0.5"]


class ChangeSettings(TrainerCallback):
    """Gives a run the settings of NEW after its second step, as the reference of a resume.

    And leaves a part of the model in evaluation mode, which the next step must not mind.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert all(module.training for module in kwargs["model"].modules())
        next(iter(kwargs["model"].modules())).backbone.eval()
        if state.global_step != 2:
            return
        engine = kwargs["model"] if hasattr(kwargs["model"], "optimizer") else None
        scheduler, optimizer = kwargs["lr_scheduler"], engine.optimizer if engine else kwargs["optimizer"]
        for number, group in enumerate(optimizer.param_groups):
            scheduler.base_lrs[number] *= 0.2 * (3 if group["name"].startswith("head/det") else 1)
            group["lr"] = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](2)
            group["betas"] = (0.5, group["betas"][1])
            if not group["name"].endswith("no_decay"):
                group["weight_decay"] = 0.3


def trained(name: str, *overrides: str, after: Path | None = None) -> Path:
    """Train the tiny run, from a checkpoint if one is given; return its folder."""
    folder = FOLDER / name
    given = [f"output_dir={folder}", *SHORT, *overrides]
    if after is not None:
        folder.mkdir()
        shutil.copytree(after, folder / after.name)
        given.append("trainer.resume_from_checkpoint=true")
    run.train_run(load_config(HOME / "tiny.yaml", given))
    return folder


@cache
def begun(stage: int, *overrides: str) -> Path:
    """The checkpoint of step 2 of a run without a break."""
    name = f"begun{stage}{len(overrides)}"
    return trained(name, f"deepspeed=configs/deepspeed/zero{stage}.json", *overrides) / "checkpoint-2"


def history(folder: Path, key: str) -> list[float]:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if "loss" in entry]


def warnings(folder: Path) -> str:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return "\n".join(event["message"] for event in events if event["event"] == "warning")


def check_settings(stage: int) -> None:
    """A resume with new rates, decays and betas equals a run that changed them at that step."""
    deepspeed = f"deepspeed=configs/deepspeed/zero{stage}.json"
    callback = "callbacks=[tests.training.ranks_resume.ChangeSettings]"
    expected = load_file(trained(f"changed{stage}", deepspeed, callback) / "checkpoint-4" / "model.safetensors")
    folder = trained(f"resumed{stage}", deepspeed, *NEW, after=begun(stage))
    found = load_file(folder / "checkpoint-4" / "model.safetensors")
    first = load_file(begun(stage).with_name("checkpoint-4") / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert any(not torch.equal(first[name], value) for name, value in found.items())
    assert history(folder, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 1e-4, 0.5e-4])
    said = warnings(folder)
    assert "continues checkpoint-2 with other settings from step 2 on" in said
    for words in (
        "learning rate of head/cls/no_decay 0.0002 (before: 0.001) and of 7 further groups",
        "weight_decay of head/cls/decay 0.3 (before: 0)",
        "betas of head/cls/no_decay (0.5, 0.999)",
    ):
        assert words in said, said


def check_nothing_changes() -> None:
    """The same settings: no warning, the same weights, and no sample is counted."""
    before = frequencies._spread

    def forbidden(*args: Any) -> None:
        raise AssertionError("a resume counts the data again")

    checkpoint = begun(2)
    frequencies._spread = forbidden
    try:
        folder = trained("same", after=checkpoint)
    finally:
        frequencies._spread = before
    assert "other settings" not in warnings(folder)
    expected = load_file(checkpoint.with_name("checkpoint-4") / "model.safetensors")
    found = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def check_muon(stage: int) -> None:
    """A resume under Muon leaves the weights of a run without a break, bit for bit."""
    settings = [
        "trainer.optim=muon",
        "trainer.optim_args=muon_lr=0.01",
        f"deepspeed=configs/deepspeed/zero{stage}.json",
    ]
    checkpoint = trained(f"muon{stage}", *settings) / "checkpoint-2"
    folder = trained(f"muon_resumed{stage}", *settings, after=checkpoint)
    expected = load_file(checkpoint.with_name("checkpoint-4") / "model.safetensors")
    found = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before = load_file(checkpoint / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in expected.items() if ".layer." in name)


def check_length() -> None:
    """The schedule of a longer run is used from the first resumed step on."""
    folder = trained("longer", "trainer.max_steps=8", "trainer.save_steps=4", after=begun(2))
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    assert rates == pytest.approx([1e-3, 7.5e-4, *(1e-3 * (1 - step / 8) for step in range(2, 8))])


def check_kinds() -> None:
    """A different optimizer, and a schedule of a different kind, are refused; one that waits keeps its reductions."""
    with pytest.raises(ConfigError, match="trainer.optim = 'sgd': .* was saved with 'adamw_torch'.*model.start_from"):
        trained("sgd", "trainer.optim=sgd", after=begun(2))
    other = trained("weights", "balancer={name: random, seed: 3}", after=begun(2))  # its state is none of TBGC's
    assert len(history(other, "learning_rate")) == 4
    plateau = ["trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.eval_strategy=steps", "trainer.eval_steps=1",
               "trainer.lr_scheduler_kwargs={patience: 0, threshold: 10.0, factor: 0.5}"]  # fmt: skip
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau': .* schedule of a different kind"):
        trained("kind", *plateau, after=begun(2))
    usual = begun(2, *plateau)
    rates = history(usual.parent, "learning_rate")
    assert rates[3] < rates[0] == 1e-3
    again = trained("plateau", *plateau, "trainer.learning_rate=1e-2", after=usual)
    assert history(again, "learning_rate") == pytest.approx([*rates[:2], *(10 * rate for rate in rates[2:])])


if __name__ == "__main__":
    run.finish_run = lambda trainer, metrics: None  # no evaluation, plots and pages
    checks = {f"check_settings {stage}": partial(check_settings, stage) for stage in (2, 3)}
    checks |= {f"check_muon {stage}": partial(check_muon, stage) for stage in (2, 3)}
    run_checks(
        checks | {check.__name__: check for check in (check_nothing_changes, check_length, check_kinds)}, sys.argv[1]
    )
