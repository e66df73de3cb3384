"""Training of the ladder's runs: each in a process of its own, several at a time."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.launch import worker_environment
from benchmarks.common.machine import processor_name
from benchmarks.ladder.data import make_data
from benchmarks.ladder.plan import AT_BACKBONE, METHODS, MUON_FACTOR, OPTIMIZERS, SINGLE, TASKS_OF, Spec
from benchmarks.ladder.records import Records

UPDATES = "updates.jsonl"
"""Name of the file in a run's folder that has the tasks' parts of the update."""


def run_file(records: Records, spec: Spec, data_root: Path, folder: Path) -> dict[str, Any]:
    """Return the content of a run's YAML file: the size's base with method, optimizer, learning rate and seed."""
    run = json.loads(json.dumps(records.bases[spec.data]))
    balancer: dict[str, Any] = {"name": "sum"} if spec.method in SINGLE else dict(METHODS[spec.method])
    if spec.method == "static":
        balancer["weights"] = records.static_weights(spec.data, spec.optimizer)
    run["tasks"] = {task: run["tasks"][task] for task in spec.tasks}
    for group in run.get("joint", {}).values():
        group["tasks"] = spec.tasks
        group["at"] = "backbone" if spec.method in AT_BACKBONE else "features"
        for split in ("train", "test"):
            group[split]["labels"] = {task: group[split]["labels"][task] for task in spec.tasks}
    run["trainer"] |= {**OPTIMIZERS[spec.optimizer], "learning_rate": spec.lr, "seed": spec.seed}
    if spec.optimizer == "muon":
        run["trainer"]["optim_args"] = f"muon_lr={MUON_FACTOR * spec.lr:g}"
    return {**run, "name": spec.name, "data_root": str(data_root), "output_dir": str(folder), "balancer": balancer}


def command(file: Path, gpu: bool, updates: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment of a run on one rank, on the GPU or on one core.

    Args:
        file: of the run.
        gpu: whether it runs on the GPU.
        updates: whether it measures the tasks' parts of the update.
    """
    from allinone_ds.training.launcher import free_port, quiet_environment

    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **quiet_environment(), **one, **worker_environment(), "TORCHDYNAMO_DISABLE": "1"}
    if not gpu:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    start = "from benchmarks.ladder.train import train; raise SystemExit(train())"
    words = [sys.executable, "-c", start, str(file)]
    return [*words, *(["--updates", str(file.with_name(UPDATES))] if updates else [])], environment


def measures_updates(spec: Spec) -> bool:
    """Return whether a run measures what AdamW makes of the tasks' gradients: one run of every method does, but for
    joint blocks, whose gradients are balanced inside of the block."""
    one = spec.optimizer == "adamw" and spec.split == "test" and spec.seed == 0 and len(spec.tasks) > 1
    return one and spec.data != "joint"


def read_run(folder: Path, spec: Spec) -> dict[str, Any]:
    """Return metrics, norms, parts of the update and times from a run's folder."""
    metrics = json.loads((folder / "metrics.json").read_text())
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logs = [event for event in events if event["event"] == "log" and "loss" in event]

    def values(task: str, kind: str) -> list[float]:
        found = (entry.get(f"grad_norm/{task}/{kind}") for entry in logs)
        return [float(f"{value:.4g}") for value in found if value is not None]

    metric_of = {task: TASKS_OF[spec.data][task] for task in spec.tasks}
    raw = {task: values(task, "raw") for task in spec.tasks}
    updates = folder / UPDATES
    steps = [json.loads(line) for line in updates.read_text().splitlines()] if updates.exists() else []
    parts = {
        kind: {name: round(statistics.fmean(step[kind][name] for step in steps), 4) for name in values}
        for kind, values in (steps[0].items() if steps else ())
    }
    return {
        "metrics": {task: float(metrics[f"eval_{task}_{metric}"]) for task, metric in metric_of.items()},
        "steps": metrics["steps"],
        "norms": {
            task: {"median": statistics.median(curve or [math.nan]), "curve": curve} for task, curve in raw.items()
        },
        "scaled": {task: values(task, "scaled") for task in spec.tasks},
        "shares": {task: round(statistics.fmean(values(task, "share") or [math.nan]), 4) for task in spec.tasks},
        **({"update": parts} if parts else {}),
        "losses": {task: float(f"{logs[-1][f'loss/{task}']:.4g}") for task in spec.tasks},
        "train_seconds": metrics["train_runtime"],
        "eval_seconds": metrics["eval_runtime"],
    }


def diverged(log: str) -> bool:
    """Return whether a failed run failed because its learning rate was too high."""
    return "was not finite in" in log


@dataclass
class Job:
    """A run that is being trained."""

    spec: Spec
    process: subprocess.Popen[bytes]
    folder: Path
    run: dict[str, Any]
    start: float


class Runner:
    """Trains the runs that have no record, several at a time.

    Args:
        records: of the size.
        work: folder for data and runs.
        wheel: of DeepForest; None: the runs on its data are not trained.
        gpu: train on a GPU instead of one CPU core per run.
    """

    def __init__(self, records: Records, work: Path, wheel: Path | None, gpu: bool):
        self.records, self.work, self.wheel, self.gpu = records, work, wheel, gpu
        self.jobs: dict[int, Job] = {}
        self.failed: dict[Spec, Path] = {}  # with its log

    def next(self, blocks: list[tuple[str, str]]) -> Spec | None:
        """Return the first run without a record that is not being trained and has not failed; None if there is none."""
        busy = {job.spec for job in self.jobs.values()} | self.failed.keys()
        for data, optimizer in blocks:
            for spec in self.records.planned(data, optimizer):
                if spec not in busy and self.records.read(spec) is None:
                    return spec
        return None

    def start(self, spec: Spec) -> None:
        """Make the data of a run if they are missing, and start it."""
        data = self.work / "data" / spec.data
        make_data(data, spec.data, self.records.size, self.wheel)
        folder = self.work / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run = run_file(self.records, spec, data / spec.split, folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        words, environment = command(folder / "run.yaml", self.gpu, measures_updates(spec))
        with (folder / "run.log").open("wb") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.jobs[process.pid] = Job(spec, process, folder, run, time.perf_counter())

    def finish(self) -> None:
        """Wait until a run ends and append its record; one that failed is set aside."""
        pid, status, usage = os.wait4(-1, 0)
        if pid not in self.jobs:
            return
        job = self.jobs.pop(pid)
        job.process.returncode = os.waitstatus_to_exitcode(status)
        spec, log = job.spec, (job.folder / "run.log").read_text(errors="replace")
        if job.process.returncode == 0:
            found = {**read_run(job.folder, spec), "diverged": False}
        elif diverged(log):
            zero = dict.fromkeys(spec.tasks, 0.0)
            found = {"metrics": zero, "steps": self.records.bases[spec.data]["trainer"]["max_steps"], "diverged": True}
        else:
            self.failed[spec] = job.folder / "run.log"
            print(f"{spec.name} failed; its log is {self.failed[spec]}:\n{log[-2000:]}", file=sys.stderr, flush=True)
            return
        self.records.append(spec, {
            "balancer": job.run["balancer"], **found,
            "logging_steps": self.records.bases[spec.data]["trainer"]["logging_steps"],
            "wall_seconds": round(time.perf_counter() - job.start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mib": usage.ru_maxrss // 1024, "device": device_name(self.gpu), "versions": versions(),
            "settings": self.records.settings(spec.data),
        })  # fmt: skip
        shutil.rmtree(job.folder)
        scores = "  ".join(f"{task} {value:.3f}" for task, value in found["metrics"].items())
        print(f"{time.strftime('%H:%M:%S')}  {spec.name}  {scores}", flush=True)

    def run(self, blocks: list[tuple[str, str]], jobs: int) -> None:
        """Train all runs of the blocks that have no record.

        Raises:
            SystemExit: some have failed; the others are trained.
        """
        try:
            while True:
                spec = self.next(blocks) if len(self.jobs) < jobs else None
                if spec is not None:
                    self.start(spec)
                elif self.jobs:
                    self.finish()
                elif self.failed:
                    logs = "".join(f"\n{spec.name}: {log}" for spec, log in self.failed.items())
                    raise SystemExit(f"{len(self.failed)} runs failed; the same command tries them again:{logs}")
                else:
                    return
        finally:
            for job in self.jobs.values():
                job.process.kill()


def versions() -> dict[str, str]:
    """Return the versions of the packages on which the figures depend."""
    names = ("torch", "torchvision", "deepspeed", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def device_name(gpu: bool) -> str:
    """Return the name of the GPU or of the processor."""
    if gpu:
        import torch

        return torch.cuda.get_device_name()
    return processor_name()
