"""Resuming from a checkpoint: the best one is found, and a different model or different data are reported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allinone_ds.data.base import Problem
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.errors import ConfigError
from allinone_ds.models.freezing import freeze_backbone
from allinone_ds.training import load_checkpoint as loading
from allinone_ds.training import save_checkpoint as saving
from allinone_ds.training.ema import AverageWeights
from allinone_ds.training.load_checkpoint import best_checkpoint, check_model, check_resumable
from allinone_ds.training.optimizer import continue_schedule, group_settings
from allinone_ds.training.run import _last_evaluation, _warn_at_start
from allinone_ds.training.start.loop_state import continue_data
from tests.tiny import LIGHT, tiny_model


def test_the_best_checkpoint_is_searched_in_the_folder_of_the_resumed_one(tmp_path: Path) -> None:
    here, there = tmp_path / "new" / "checkpoint-4", tmp_path / "old" / "checkpoint-2"
    here.mkdir(parents=True)
    there.mkdir(parents=True)
    (here / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(there)}))
    assert best_checkpoint(here) is None
    (tmp_path / "new" / "checkpoint-2").mkdir()
    assert best_checkpoint(here) == str(tmp_path / "new" / "checkpoint-2")
    (here / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
    assert best_checkpoint(here) is None


def test_the_metrics_of_the_best_are_those_of_the_checkpoint_that_was_loaded() -> None:
    """Evaluated in every step, saved in every second one: the best evaluation, of step 3, left no weights."""
    history = [{"step": step, "eval_score": score} for step, score in ((1, 0.1), (2, 0.5), (3, 0.9), (4, 0.2))]
    state = SimpleNamespace(
        best_model_checkpoint="runs/x/checkpoint-2", best_global_step=3, global_step=4, log_history=history
    )
    details = {("eval", step): {"det": step} for step in (2, 4)}
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=True), details=details)
    assert _last_evaluation(trainer) == ({"eval_score": 0.5}, {"det": 2})  # type: ignore[arg-type]
    trainer.args.load_best_model_at_end = False
    assert _last_evaluation(trainer) == ({"eval_score": 0.2}, {"det": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "backbone", "words"),
    [
        ({"det": LIGHT["det"], "seg": LIGHT["seg"]}, {}, ["task 'cls' is in the checkpoint, but not in this run"]),
        ({**LIGHT, "seg": ("light", {"width": 16})}, {}, ["task 'seg' differs: tasks.seg.", "(16,", "(32,"]),
        (LIGHT, {"hidden_size": 16}, ["the backbone differs: backbone.", "task 'det' differs"]),
    ],
)
def test_a_different_model_is_named(tmp_path: Path, heads: dict, backbone: dict, words: list[str]) -> None:
    model = tiny_model()
    check_model(model, tmp_path)  # only weights tell
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    check_model(model, tmp_path)
    with pytest.raises(ConfigError) as error:
        check_model(tiny_model(heads, **backbone), tmp_path)
    for word in (*words, f"model.start_from={tmp_path}"):
        assert word in str(error.value)
    save_file(tiny_model({"det": LIGHT["det"]}).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="task 'seg' is not in the checkpoint; task 'cls' is not in the checkpoint"):
        check_model(model, tmp_path)


def test_a_checkpoint_of_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    save_file(tiny_model().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"save_only_model.*model.start_from={tmp_path}"):
        check_resumable(tmp_path)
    (tmp_path / "latest").write_text("global_step2")
    check_resumable(tmp_path)


def have_shards(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> None:
    """Let every checkpoint have ZeRO shards of a model."""
    trained, frozen = (
        {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad == trains}
        for trains in (True, False)
    )
    monkeypatch.setattr(loading, "shards_of", lambda checkpoint: checkpoint / "global_step2")
    monkeypatch.setattr(loading, "trained_shapes", lambda folder: trained)
    monkeypatch.setattr(loading, "frozen_shapes", lambda folder: frozen)


def test_shards_without_gathered_weights_tell_the_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    have_shards(monkeypatch, model)
    check_model(model, tmp_path)
    with pytest.raises(ConfigError, match="the backbone differs"):
        check_model(tiny_model(hidden_size=16), tmp_path)


@pytest.mark.parametrize("gathered", [True, False])
def test_a_checkpoint_of_other_frozen_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    model = tiny_model()
    have_shards(monkeypatch, model)
    if gathered:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    check_model(model, tmp_path)
    freeze_backbone(model.backbone, 1)
    with pytest.raises(ConfigError, match="parameters were trained there and are frozen in this run.*model.freeze"):
        check_model(model, tmp_path)


def schedule(batch: int, ranks: int, seed: int = 0, size: int = 24) -> Schedule:
    return Schedule(seed, {"a": size}, {"a": (batch, 2)}, ranks)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (schedule(2, 4), None),  # the same samples, on other ranks
        (schedule(2, 2), None),  # the next samples, in steps of another size
        (schedule(4, 2, seed=1), "the seed was 1, is 0"),
        (schedule(4, 2, size=23), "samples of 'a' was 23, is 24"),
    ],
)
def test_a_different_order_of_data_is_reported(then: Schedule, words: str | None) -> None:
    messages: list[str] = []
    for state in ({"data": then.basis(), "positions": then.state(5)}, {"data": then.basis()}):  # of earlier releases
        trainer = SimpleNamespace(schedule=schedule(4, 2), warn=lambda step, message: messages.append(message))
        continue_data(trainer, state, 5, None)
        assert trainer.schedule.position("a", 6) == 5 * then.images("a") + 16
    assert not messages if words is None else all(words in message and "step 5" in message for message in messages)


@pytest.mark.parametrize("asked", [0.5, 0.1])
def test_a_resume_has_the_learning_rates_that_are_asked_for(tmp_path: Path, asked: float) -> None:
    def scheduler(rate: float) -> torch.optim.lr_scheduler.LambdaLR:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)

    before = scheduler(0.5)
    for _ in range(4):
        before.optimizer.step()
        before.step()
    torch.save(before.state_dict(), tmp_path / "scheduler.pt")
    now, messages = scheduler(asked), []
    trainer = SimpleNamespace(
        deepspeed=SimpleNamespace(optimizer=now.optimizer),
        state=SimpleNamespace(global_step=4),
        lr_scheduler=now,
        changes=None,
        warn=lambda step, message: messages.append(message),
    )
    continue_schedule(trainer, tmp_path, group_settings(now.optimizer))
    assert now.optimizer.param_groups[0]["lr"] == now.get_last_lr()[0] == asked * 0.5
    assert now.last_epoch == 4 and bool(messages) == (asked != 0.5)
    now.step()
    assert now.optimizer.param_groups[0]["lr"] == asked * 0.375


def test_fresh_heads_and_the_first_warnings_of_the_data_are_reported() -> None:
    messages: list[str] = []
    trainer: Any = SimpleNamespace(warn=lambda step, message: messages.append(message))
    problems = [Problem("boxes.json", f"fault {number}", "warning") for number in range(9)]
    data: Any = SimpleNamespace(dataset=SimpleNamespace(structural=problems))
    _warn_at_start(trainer, {"det": data}, ["det", "seg"])
    assert "start_from: the heads of det, seg start from random weights" in messages[0]
    assert messages[1:] == ["boxes.json: fault 0", "boxes.json: fault 1", "boxes.json: fault 2"]
    messages.clear()
    _warn_at_start(trainer, {}, [])
    assert messages == []


def test_an_average_that_restarts_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    trainer = SimpleNamespace(
        deepspeed=None,
        changes=None,
        resumed_from=Path("checkpoint-4"),
        warn=lambda step, message: messages.append(message),
    )
    for has_one in (True, False):
        average = SimpleNamespace(load=lambda folder, has_one=has_one: has_one)
        monkeypatch.setattr("allinone_ds.training.ema.ShardEMA", lambda engine, decay, average=average: average)
        AverageWeights(trainer).on_train_begin(SimpleNamespace(ema_decay=0.9), SimpleNamespace(global_step=4), None)
        assert bool(messages) != has_one


def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.save_weights({"w": torch.ones(3)}, tmp_path)

    def broken_off(tensors: object, target: Path, metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "save_file", broken_off)
    with pytest.raises(OSError, match="No space"):
        saving.save_weights({"w": torch.zeros(3)}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.ones(3))
