"""The scripts in examples/ run on two ranks as their docstrings say, and stay short enough to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from allinone_ds.testing.launcher import torchrun

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: str, *arguments: str, **variables: str) -> str:
    """Run an example on two ranks; return what it prints."""
    environment = {"PYTHONPATH": str(ROOT), **variables}
    command = [f"examples/{script}", *arguments]
    done = torchrun(command, 2, environment=environment, folder=ROOT, capture=True, timeout=300)
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


def test_trainer_script_reports_norms_and_scores(tmp_path: Path) -> None:
    out = run("trainer_script.py", "--steps", "20", "--output", str(tmp_path), TORCHDYNAMO_DISABLE="1")
    assert "grad_norm/boxes/raw" in out and "eval_score" in out
