"""Part `saving`: a save in the step or beside it, and a resumed run."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.forked_run import make_run
from benchmarks.gpu.part import Run, run_command

STEPS = 16


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield how a run ends that saves in its steps, and the same run that saves beside them, is stopped and resumed."""
    home = run.folder / "runs"
    shutil.rmtree(home, ignore_errors=True)  # of an earlier call
    home.mkdir()
    file = make_run(home)
    content = yaml.safe_load(file.read_text())
    content["trainer"] |= {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1}
    content["trainer"] |= {"lr_scheduler_type": "constant", "async_save": True}
    file.write_text(yaml.safe_dump(content))
    whole = train(run, file, home / "whole", "trainer.async_save=false")
    half = train(run, file, home / "stopped", f"trainer.max_steps={STEPS // 2}")
    rest = train(run, file, home / "stopped", "--resume")
    for what, (status, steps, end) in {"whole, saved in a step": whole, "first half, saved beside the steps": half,
                                       "both halves": rest}.items():  # fmt: skip
        seconds = [step["seconds/step"] for step in steps[2:] if "seconds/step" in step]
        yield {"what": what, "status": status, "seconds": statistics.median(seconds) if seconds else None,
               "longest_step": max(seconds, default=None), "end": end}  # fmt: skip
    yield {"what": "resumed beside uninterrupted, losses", "difference": largest_difference(rest[1], whole[1])}


def train(run: Run, file: Path, output: Path, *overrides: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the training on one rank; return its exit status, the logged steps, and the end of an error."""
    command = [sys.executable, "-W", "ignore", "-m", "allinone_ds.train", str(file), f"output_dir={output}", *overrides]
    status, _, errors = run_command(command, run.left() - 5)
    log = output / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return status, [line for line in lines if "loss" in line], errors[-500:] if status else ""


def largest_difference(steps: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float | None:
    """Return the largest relative difference of a task's loss in a step that both have logged; None without one."""
    by_step = {line["step"]: line for line in wanted}
    ratios = [
        abs(line[key] / by_step[line["step"]][key] - 1)
        for line in steps if line["step"] in by_step
        for key in line if key.startswith("loss/")
    ]  # fmt: skip
    return max(ratios, default=None)
