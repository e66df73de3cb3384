"""The Trainer script of examples/ runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_trainer_script(tmp_path: Path) -> None:
    script = ROOT / "examples" / "trainer_script.py"
    assert len(script.read_text().splitlines()) < 60
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*command, "--steps", "20", "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "grad_norm/boxes/raw" in done.stdout and "eval_score" in done.stdout
