"""Part `saving`: the optimizer in the host's memory, a save in the step or beside it, and a resumed run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.forked_run import make_run
from benchmarks.gpu.part import Run
from benchmarks.gpu.steps import timed
from benchmarks.gpu.vit import PLAIN, Vit, large

STEPS = 16


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield rows of the offloaded optimizer, then of a whole run, the same run stopped and resumed, and both saves."""
    yield from resumed(run)
    run.join()
    for stage in (2, 3):
        for mode in (PLAIN, "exact")[run.pick(0, 1) :]:
            zero = {"offload_optimizer": {"device": "cpu", "pin_memory": run.on_gpu}}
            vit = Vit(run, large(run), run.pick(224, 32), run.pick(32, 2), stage, mode, zero)
            yield {"what": "offloaded optimizer", **timed(vit, run, repeats=2)}


def resumed(run: Run) -> Iterator[dict[str, Any]]:
    """Yield what a run ends with, and the same run that was stopped in the middle."""
    home = run.folder / "runs"
    home.mkdir(exist_ok=True)
    file = make_run(home)
    content = yaml.safe_load(file.read_text())
    content["trainer"] |= {"max_steps": STEPS, "save_steps": STEPS // 2, "async_save": True, "logging_steps": 1}
    content["deepspeed"] = "configs/deepspeed/zero2.json"
    file.write_text(yaml.safe_dump(content))
    whole = train(run, file, home / "whole", "trainer.async_save=false")
    yield {"what": "run, saved in the step", **whole}
    yield {"what": "run, saved beside the steps", **train(run, file, home / "beside")}
    first = train(run, file, home / "stopped", f"trainer.max_steps={STEPS // 2}", "trainer.lr_scheduler_type=constant")
    yield {"what": "first half", **first}
    steady = train(run, file, home / "steady", "trainer.lr_scheduler_type=constant")
    again = train(run, file, home / "stopped", "trainer.lr_scheduler_type=constant", "--resume")
    yield {"what": "second half, resumed", **again, "difference": largest_difference(again["losses"], steady["losses"])}


def train(run: Run, file: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """Run `allinone-ds train` on one rank; return its status, and the losses of the last steps by task."""
    command = [sys.executable, "-W", "ignore", "-m", "allinone_ds.train", str(file), f"output_dir={output}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, run.left()), check=False)
    log = output / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    losses = [{key: value for key, value in line.items() if "loss" in key} for line in lines if _is_log(line)]
    return {"status": done.returncode, "losses": losses[-1:], "end": done.stderr[-500:] if done.returncode else ""}


def largest_difference(losses: list[dict[str, float]], wanted: list[dict[str, float]]) -> float | None:
    """Return the largest relative difference of the last losses; None where there are none."""
    if not losses or not wanted:
        return None
    return max(abs(losses[-1].get(key, float("nan")) / value - 1) for key, value in wanted[-1].items() if value)


def _is_log(line: dict[str, Any]) -> bool:
    return any("loss" in key for key in line)
