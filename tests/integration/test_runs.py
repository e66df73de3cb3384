"""Whole runs on two ranks through the real launchers: train, resume, evaluate, predict."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from allinone_ds import cli
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.metrics import flatten
from allinone_ds.evaluation.predictor import evaluate_run, load_run, predict_images
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.training.load_checkpoint import read_loop_state
from tests.tiny_run import TEST_SAMPLES, launch
from tools.make_reference import EVALUATION_NAMES, EVENTS, TRAINER_NAMES, log_names

OVERRIDES = ["trainer.load_best_model_at_end=true", "trainer.ema_decay=0.5"]


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """The tiny run, trained without a break through the DeepSpeed launcher, ZeRO-2."""
    launch(home, "deepspeed", *OVERRIDES)
    return home / "run"


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_leaves_its_folder_complete(run: Path, home: Path) -> None:
    for name in (
        "config.yaml",
        "model.json",
        "metrics.json",
        "model.safetensors",
        "log.jsonl",
        "predictions.html",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in (run / "plots").iterdir()} == {"loss.png", "norms.png", "metrics.png"}
    assert {path.name.split("-")[0] for path in (run / "predictions").iterdir()} == set(TEST_SAMPLES)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    expected = load_config(home / "tiny.yaml", OVERRIDES)
    for folder in (run, *checkpoints(run)):
        assert load_config(folder / "config.yaml") == expected


def test_every_step_is_logged_once_by_task_and_name(run: Path) -> None:
    logs = [entry for entry in history(run / "checkpoint-4") if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    for entry in logs:
        assert entry["loss"] == pytest.approx(sum(entry[f"loss/{task}"] for task in TEST_SAMPLES), rel=1e-5)
        for task in TEST_SAMPLES:
            norm, scale = entry[f"grad_norm/{task}/raw"], entry[f"grad_norm/{task}/scale"]
            assert scale == pytest.approx(min(1.0, 0.1 / (norm + 1e-6)), rel=1e-4)
            assert entry[f"grad_norm/{task}/scaled"] == pytest.approx(norm * scale, rel=1e-5)
            assert entry[f"skipped/{task}"] == 0
        assert entry["broken_images"] == 0
        assert entry["epoch"] == entry["step"] / 4
    # 4 images per rank and step on 2 ranks, 24 images per epoch
    assert [entry["epoch/cls"] for entry in logs] == pytest.approx([step * 8 / 24 for step in (1, 2, 3, 4)])


def test_every_name_in_the_logs_is_in_the_reference(run: Path) -> None:
    documented = [*TRAINER_NAMES, *log_names(), *EVALUATION_NAMES]
    words = {"eval_ema_...": "eval_ema_.+", "TASK": "(det|seg|cls)", "METRIC": r"\w+", "CLASS": "[^/]+"}
    patterns = [re.sub("|".join(map(re.escape, words)), lambda m: words[m[0]], name) for name in documented]
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} <= EVENTS.keys()
    names = {name for event in events if event["event"] == "log" for name in event} - {"event", "time", "step"}
    names |= json.loads((run / "metrics.json").read_text()).keys() - {"steps", "world_size", "best_step", "details"}
    assert [name for name in sorted(names) if not any(re.fullmatch(p, name) for p in patterns)] == []


def test_the_schedule_moves_once_a_step_and_the_head_rate_is_logged(run: Path) -> None:
    rates = [entry["learning_rate"] for entry in history(run / "checkpoint-4") if "loss" in entry]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_each_rank_draws_random_numbers_of_its_own(run: Path) -> None:
    states = [torch.load(run / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False) for rank in range(2)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_two_ranks_count_every_sample_once_and_agree_with_one_process(run: Path) -> None:
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    evaluations = {entry["step"]: entry for entry in history(run / "checkpoint-4") if "eval_score" in entry}
    assert sorted(evaluations) == [2, 4]
    for step, found in evaluations.items():
        alone = flatten(evaluate_run(run / f"checkpoint-{step}"))
        for task, count in TEST_SAMPLES.items():
            assert found[f"eval_{task}_samples"] == alone[f"eval_{task}_samples"] == count
        for key, value in alone.items():
            assert found[key] == pytest.approx(value, abs=1e-4), key
        main = [
            found[f"eval_{task}_{metric}"] for task, metric in zip(TEST_SAMPLES, ("map50", "miou", "top1"), strict=True)
        ]
        assert found["eval_score"] == pytest.approx(sum(main) / 3)
    assert state["best_metric"] == max(found["eval_score"] for found in evaluations.values())


def test_the_best_checkpoint_is_what_remains(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    scores = {e["step"]: e["eval_score"] for e in history(run / "checkpoint-4") if "eval_score" in e}
    assert metrics["eval_score"] == max(scores.values()) == scores[metrics["best_step"]]
    final = load_file(run / "model.safetensors")
    best = load_file(run / f"checkpoint-{metrics['best_step']}" / "model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in best)


def test_every_class_is_in_the_records_of_the_run(run: Path) -> None:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    notes = [event["message"] for event in events if event["event"] == "note"]
    assert len(notes) == 1 and notes[0].startswith("seg: class frequencies of 24 training images: background")
    metrics = json.loads((run / "metrics.json").read_text())
    alone = evaluate_run(run)
    assert set(metrics["details"]) == set(TEST_SAMPLES)
    for task, details in metrics["details"].items():
        again = alone.details[task]
        assert details["classes"] == again["classes"]
        for name, values in details["per_class"].items():  # two ranks and one process
            for value, expected in zip(values, again["per_class"][name], strict=True):
                assert value == (None if expected is None else pytest.approx(expected, abs=1e-4)), (task, name)
        assert [image["path"] for image in details["worst"]] and len(details["worst"]) <= 8
        drawn = sorted((run / "worst").glob(f"{task}-*.png"))
        assert len(drawn) == len(details["worst"])
    averaged = json.loads((run / "ema" / "metrics.json").read_text())
    assert set(averaged["details"]) == set(TEST_SAMPLES)
    assert "<h2>Classes</h2>" in (run / "report.html").read_text()
    logged = [entry for entry in history(run / "checkpoint-4") if "eval_score" in entry]
    assert any(key.startswith("eval_seg_class/background/iou") for key in logged[-1])


def test_the_average_of_the_weights_is_a_run_of_its_own(run: Path) -> None:
    for step in (2, 4):  # every optimizer step counts once
        state = torch.load(run / f"checkpoint-{step}" / "ema_rank_00001_of_00002.pt", weights_only=True)
        assert state["steps"] == step
    average, last = (load_file(f / "model.safetensors") for f in (run / "ema", run / "checkpoint-4"))
    assert average.keys() == last.keys() and not all(torch.equal(average[name], last[name]) for name in last)
    metrics = json.loads((run / "metrics.json").read_text())
    for key, value in flatten(evaluate_run(run / "ema"), "eval_ema").items():
        assert metrics[key] == pytest.approx(value, abs=1e-4), key


def test_a_resumed_run_equals_an_uninterrupted_one(run: Path, home: Path) -> None:
    broken_off = home / "resumed"
    broken_off.mkdir()
    shutil.copytree(run / "checkpoint-2", broken_off / "checkpoint-2")
    launch(home, "torchrun", f"output_dir={broken_off}", "trainer.ema_decay=0.5", "--resume")
    whole = load_file(run / "checkpoint-4" / "model.safetensors")
    resumed = load_file(broken_off / "checkpoint-4" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    whole, resumed = (load_file(folder / "ema" / "model.safetensors") for folder in (run, broken_off))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    first, second = history(run / "checkpoint-4"), history(broken_off / "checkpoint-4")
    assert [e["loss"] for e in second if "loss" in e] == pytest.approx(
        [e["loss"] for e in first if "loss" in e], rel=1e-4
    )
    assert [e["epoch"] for e in second if "loss" in e] == [0.25, 0.5, 0.75, 1.0]


def test_tasks_on_different_ranks_give_the_same_result(run: Path, home: Path) -> None:
    apart = home / "apart"
    apart.mkdir()
    shutil.copytree(run / "checkpoint-2", apart / "checkpoint-2")  # a run may change its groups, or have none before
    groups = "balancer.groups={det: [0], seg: [1], cls: [1]}"
    launch(home, "torchrun", f"output_dir={apart}", "balancer.parallel=tasks", groups, *OVERRIDES, "--resume")
    usual, found = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (run, apart))
    for name, value in usual.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    first, second = ([e for e in history(f / "checkpoint-4") if "loss" in e] for f in (run, apart))
    for before, now in zip(first, second, strict=True):
        for task in TEST_SAMPLES:
            for key in (f"loss/{task}", f"grad_norm/{task}/raw", f"grad_norm/{task}/share", f"epoch/{task}"):
                assert now[key] == pytest.approx(before[key], rel=1e-3), (now["step"], key)
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-4)
    usual_state, state = (read_loop_state(folder / "checkpoint-4", 1) for folder in (run, apart))
    assert usual_state["balancer"]["combiner"] == {}
    assert set(state["balancer"]["combiner"]) == {"steps"}  # those of a combiner that keeps gradients on the rank


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["balancer.parallel=tasks", "balancer.groups={det: 1, seg: 1, cls: 1}"], "add up to the 2 ranks of this job"),
        (["balancer.parallel=tasks", "deepspeed=configs/deepspeed/zero3.json"], "cannot run on ZeRO-3"),
    ],
)
def test_invalid_groups_are_errors_without_a_traceback(
    home: Path, overrides: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(home / "tiny.yaml"), "--nproc", "2", f"output_dir={home / 'none'}", *overrides]) == 2
    said = capfd.readouterr()
    assert says in said.out + said.err and "Traceback" not in said.out + said.err


def test_zero_3_in_bf16_with_broken_images_through_the_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "zero3"
    shutil.copytree(home / "data", tmp_path / "data")
    for image in sorted((tmp_path / "data" / "detection" / "train").glob("*.jpg"))[:9]:
        image.write_bytes(image.read_bytes()[:200])
    overrides = ["deepspeed=configs/deepspeed/zero3_bf16.json", "trainer.max_steps=2"]
    overrides.append(f"data_root={tmp_path / 'data'}")
    assert cli.main(["train", str(home / "tiny.yaml"), "--nproc", "2", f"output_dir={folder}", *overrides]) == 0
    said = capsys.readouterr().out
    warned = [line for line in said.splitlines() if "warning" in line.lower()]
    assert "score" in said and all("no box has category" in line for line in warned), warned  # the data's own
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_cls_samples"] == TEST_SAMPLES["cls"]
    assert max(entry.get("broken_images", 0) for entry in history(folder / "checkpoint-2")) > 0
    model, _ = load_run(folder)
    assert sum(p.numel() for p in model.parameters()) == sum(
        v.numel() for v in load_file(folder / "model.safetensors").values()
    )


def test_predict_writes_a_picture_a_task_and_json(run: Path, home: Path, tmp_path: Path) -> None:
    image = next((home / "data" / "detection" / "test").glob("*.jpg"))
    written = predict_images(run, [image, image], tmp_path)
    assert {path.name for path in written} == {
        f"{image.stem}{number}{end}" for number in ("", "-2") for end in ("-det.png", "-seg.png", "-cls.png", ".json")
    }
    assert set(json.loads((tmp_path / f"{image.stem}.json").read_text())) == {"image", *TEST_SAMPLES}
    assert Image.open(tmp_path / f"{image.stem}-seg.png").size[0] >= 64
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="broken.jpg"):
        predict_images(run, [tmp_path / "broken.jpg"], tmp_path)


def test_check_reports_faults(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(home / "tiny.yaml")]) == 0
    shutil.copytree(home / "data", tmp_path / "data")
    broken = next((tmp_path / "data" / "segmentation" / "train" / "images").glob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:100])
    assert cli.main(["check", str(home / "tiny.yaml"), f"data_root={tmp_path / 'data'}"]) == 1
    assert broken.name in capsys.readouterr().out
