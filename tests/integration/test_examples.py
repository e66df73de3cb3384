"""The scripts in examples/ run on two ranks as their docstrings say, and stay short enough to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import allinone_ds
from allinone_ds import cli
from allinone_ds.evaluation.predictor import evaluate_run
from allinone_ds.testing.launcher import torchrun

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: str, *arguments: str, ranks: int = 2, **variables: str) -> str:
    """Run an example on ranks; return what it prints."""
    environment = {"PYTHONPATH": str(ROOT), **variables}
    command = [f"examples/{script}", *arguments]
    done = torchrun(command, ranks, environment=environment, folder=ROOT, capture=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_is_below_60_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_deepspeed_loop_equalises_norms() -> None:
    out = run("deepspeed_loop.py", "--steps", "21")
    assert out.count("'seg': 'norm ") == 2


def test_accelerate_loop_trains() -> None:
    out = run("accelerate_loop.py", "--steps", "21")
    first, last = (
        float(line.split("'coarse': 'loss ")[1].split(",")[0]) for line in out.splitlines() if "coarse" in line
    )
    assert last < first


def test_feature_balance_is_the_same_on_ddp_and_fsdp2() -> None:
    one, ddp, fsdp2 = (
        run("feature_balance.py", "--steps", "41", "--wrap", wrap, ranks=ranks)
        for wrap, ranks in (("none", 1), ("ddp", 2), ("fsdp2", 2))
    )
    assert ddp == fsdp2
    for out in (one, ddp):
        losses = [float(line.split("'depth': 'loss ")[1].split(",")[0]) for line in out.splitlines()]
        assert len(losses) == 3 and losses[-1] < 0.2 * losses[0]


def test_the_folder_of_a_trainer_script_is_that_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    out = run("trainer_script.py", "--steps", "20", "--output", str(folder), TORCHDYNAMO_DISABLE="1")
    assert "grad_norm/boxes/raw" in out and "eval_score" in out
    assert "step 20/20  0:00 left  loss: boxes" in out  # progress
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events[0] == "begin" and {"log", "end"} <= set(events)
    monkeypatch.chdir(tmp_path)
    measured = json.loads((folder / "metrics.json").read_text())
    evaluation = evaluate_run(folder)
    for task, metric in (("boxes", "map50"), ("labels", "top1")):
        assert evaluation.tasks[task][metric] == pytest.approx(measured[f"eval_{task}_{metric}"], abs=1e-6)
    for command in (["eval"], ["report"], ["export"]):
        assert cli.main([*command, str(folder)]) == 0
    assert (
        "boxes" in (folder / "report.html").read_text()
        and "for 20 steps" in (folder / "export" / "model" / "README.md").read_text()
    )
    image = next((folder / "data" / "detection" / "test").glob("*.jpg"))
    from_run = allinone_ds.load(folder).predict(image, "labels")[0]["scores"]
    exported = allinone_ds.load(folder / "export" / "model").predict(image, "labels")[0]["scores"]
    assert (from_run == exported).all()
    assert cli.main(["predict", str(folder), str(image), "--output", str(tmp_path / "out")]) == 0
    assert set(json.loads((tmp_path / "out" / f"{image.stem}.json").read_text())) == {"image", "boxes", "labels"}
    capsys.readouterr()
