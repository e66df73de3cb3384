"""The examples run as their docstrings say, and stay short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_is_below_60_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_deepspeed_loop_equalises_norms() -> None:
    out = run([*RANKS, "examples/deepspeed_loop.py", "--steps", "21"])
    assert out.count("'seg': 'norm ") == 2


def test_accelerate_loop_trains() -> None:
    out = run([*RANKS, "examples/accelerate_loop.py", "--steps", "21"])
    first, last = (
        float(line.split("'coarse': 'loss ")[1].split(",")[0]) for line in out.splitlines() if "coarse" in line
    )
    assert last < first
