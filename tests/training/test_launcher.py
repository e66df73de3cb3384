"""Parts of the trainer that need no launcher."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from allinone_ds import cli, commands
from allinone_ds.data.schedule import Schedule
from allinone_ds.errors import DataError, RunFailed
from allinone_ds.evaluation.evaluate import score
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.reporting.logs import TaskLogs
from allinone_ds.reporting.meters import Means
from allinone_ds.reporting.plots import series, write_plots
from allinone_ds.run_config.build import without_checkpoint
from allinone_ds.training import launcher as launch
from allinone_ds.training.launcher import follow_run
from allinone_ds.training.optimizer import parameter_groups
from tests.tiny import TINY, tiny_model


def test_groups_hold_every_trainable_parameter_once_and_one_component_each() -> None:
    model = tiny_model()
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.5, backbone_lr_factor=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    for group in groups:
        roots = {".".join(names[p].split(".")[: 1 if names[p].startswith("backbone") else 2]) for p in group["params"]}
        assert len(roots) == 1, group["name"]
        assert group["lr"] == pytest.approx(0.1 if roots == {"backbone"} else 1.0)
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.5)
    assert groups[0]["lr"] == 1.0  # Trainer logs the first group's


def test_norms_biases_embeddings_and_vectors_do_not_decay() -> None:
    model = tiny_model()
    groups = parameter_groups(model, 1.0, 0.5, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = [names[p] for group in groups if group["weight_decay"] for p in group["params"]]
    exempt = [names[p] for group in groups if not group["weight_decay"] for p in group["params"]]
    assert any("cls_token" in name for name in exempt) and any("position_embeddings" in name for name in exempt)
    assert all(not name.endswith("bias") and "norm" not in name and "lambda" not in name for name in decayed)
    assert any("query.weight" in name or "q_proj.weight" in name for name in decayed)


def test_a_parameter_outside_backbone_and_tasks_is_refused() -> None:
    model = tiny_model()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight"):
        parameter_groups(model, 1.0, 0.0, 0.1)


def test_means_leave_out_what_is_not_finite() -> None:
    means = Means(torch.device("cpu"))
    means.add({"a": torch.tensor(1.0), "b": 5.0})
    means.add({"a": torch.tensor(3.0), "b": math.inf})
    assert means.drain() == {"a": 2.0, "b": 5.0}
    assert means.drain() == {}
    means.add({"a": math.nan, "b": 1.0})
    assert math.isnan(means.drain()["a"])


def test_broken_images_are_counted_over_the_run_and_limited() -> None:
    logs = TaskLogs(Schedule(0, {"a": 4}, {"a": (2, 1)}, 1), {"a": 2}, torch.device("cpu"), max_broken_images=4)
    earlier = [{"broken_images": 2}]  # what a resumed run finds
    logs.add_broken(["a.jpg: cut off"])
    assert logs.drain(1, earlier)["broken_images"] == 3
    assert logs.drain(2, [])["broken_images"] == 3
    logs.add_broken(["b.jpg: cut off", "c.jpg: cut off"])
    with pytest.raises(DataError, match="(?s)5 images.*max_broken_images allows 4.*b.jpg"):
        logs.drain(3, [])


def test_a_task_without_a_value_counts_zero() -> None:
    assert score([0.5, -1.0, math.nan, 0.5]) == 0.25


def test_plots_show_every_task(tmp_path: Path) -> None:
    history = [
        {"step": s, "loss/a": 1.0 / s, "grad_norm/a/raw": s, "grad_norm/a/scale": 0.1 / s, "grad_norm/a/scaled": 0.1}
        for s in (1, 2)
    ] + [{"step": 2, "eval_a_map": 0.5, "eval_a_samples": 3, "eval_score": 0.5}]
    assert series(history, "grad_norm/", "/raw") == {"a": ([1, 2], [1, 2])}
    assert {path.name for path in write_plots(history, tmp_path)} == {"loss.png", "norms.png", "metrics.png"}


def test_a_backbone_from_a_checkpoint_is_built_again_without_it(tmp_path: Path) -> None:
    first = build_backbone(BackboneConfig(config=TINY))
    first.net.save_pretrained(tmp_path)
    asked = BackboneConfig(checkpoint=str(tmp_path), out_indices=[1, 2])
    again = build_backbone(without_checkpoint(asked, build_backbone(asked).config))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in first.named_parameters()}
    assert again.num_levels == 2


def test_a_failed_run_says_why_and_events_arrive(tmp_path: Path) -> None:
    event = json.dumps({"event": "begin", "step": 0})
    script = f"open({str(tmp_path / 'log.jsonl')!r}, 'a').write({event!r} + chr(10)); print('noise'); "
    events: list[dict] = []
    with pytest.raises(RunFailed, match="^data is missing$") as failed:
        failing = script + "print('error: data is missing'); raise SystemExit(2)"
        follow_run([sys.executable, "-c", failing], {}, tmp_path, events.append)
    assert failed.value.exit_code == 2
    assert events == [{"event": "begin", "step": 0}]
    with pytest.raises(RunFailed, match="(?s)train.log.*ZeroDivisionError"):
        follow_run([sys.executable, "-c", "1 / 0"], {}, tmp_path, events.append)


def test_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no configuration file" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["doctor", "a=b"])


def test_any_key_that_makes_trainer_compile_leaves_the_compiler_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(
        launch, "follow_run", lambda command, environment, *rest: seen.append("TORCHDYNAMO_DISABLE" in environment)
    )
    for trainer in ({}, {"torch_compile": True}, {"torch_compile_backend": "aot_eager"}):
        commands._run("run.yaml", [], {"name": "x", "trainer": trainer}, ranks=1)
    assert seen == [True, False, False]
