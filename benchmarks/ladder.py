"""The ladder of arXiv 2307.03465 and its neighbours, trained and compared: does balancing pay?

    apt-get install dataset-fashion-mnist
    pip download --no-deps deepforest
    python benchmarks/ladder.py --jobs 2 --deepforest deepforest-*.whl     # everything; start it again to go on
    python benchmarks/ladder.py --only adamw                               # a part of it
    python benchmarks/ladder.py --table --page docs/evidence.md            # what the records say so far, with plots

Every run is the package's own trainer on one rank and one core (one GPU with --size gpu) in a process of its own, and
leaves one record in benchmarks/results/ladder/SIZE. A run whose record is there is not done again; a record that cannot
be read, lacks something or was made with other settings counts as absent.

First each method's learning rate: three rates (SGD: five), one seed, scored on the validation split by the mean of
mAP50, mIoU and top-1 (single-task models: by their own metric); the best is used for the five seeds that are scored on
the test split. Then seed by seed, all methods of one before the next.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ladder_data import make_data
from ladder_plan import METHODS, OPTIMIZERS, SINGLE, TASKS, Records, Spec
from ladder_plots import write_plots
from ladder_table import report, write_page

HERE = Path(__file__).parent


def run_file(records: Records, spec: Spec, data_root: Path, folder: Path) -> dict[str, Any]:
    """The content of a run's YAML file: the size's base with the method, optimizer, rate and seed put in."""
    run = json.loads(json.dumps(records.base))
    balancer: dict[str, Any] = {"name": "sum"} if spec.method in SINGLE else dict(METHODS[spec.method])
    if spec.method == "static":
        balancer["weights"] = records.static_weights(spec.data, spec.optimizer)
    run["tasks"] = {task: run["tasks"][task] for task in spec.tasks}
    run["trainer"] |= {**OPTIMIZERS[spec.optimizer], "learning_rate": spec.lr, "seed": spec.seed}
    return {**run, "name": spec.name, "data_root": str(data_root), "output_dir": str(folder), "balancer": balancer}


def command(file: Path, gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a run on one rank, on the GPU or on one core."""
    from allinone_ds.training.launcher import free_port, quiet_environment

    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **quiet_environment(), **one, **paths, "TORCHDYNAMO_DISABLE": "1"}
    if not gpu:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return [sys.executable, "-m", "allinone_ds.train", str(file)], environment


def read_run(folder: Path, spec: Spec) -> dict[str, Any]:
    """Metrics, norms and shares from a run's folder."""
    metrics = json.loads((folder / "metrics.json").read_text())
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logs = [event for event in events if event["event"] == "log" and "loss" in event]

    def values(task: str, kind: str) -> list[float]:
        found = (entry.get(f"grad_norm/{task}/{kind}") for entry in logs)
        return [float(f"{value:.4g}") for value in found if value is not None]

    raw = {task: values(task, "raw") for task in spec.tasks}
    return {
        "metrics": {task: float(metrics[f"eval_{task}_{TASKS[task]}"]) for task in spec.tasks},
        "steps": metrics["steps"],
        "norms": {
            task: {"median": statistics.median(curve or [math.nan]), "curve": curve} for task, curve in raw.items()
        },
        "scaled": {task: values(task, "scaled") for task in spec.tasks},
        "shares": {task: round(statistics.fmean(values(task, "share") or [math.nan]), 4) for task in spec.tasks},
        "losses": {task: float(f"{logs[-1][f'loss/{task}']:.4g}") for task in spec.tasks},
        "train_seconds": metrics["train_runtime"],
        "eval_seconds": metrics["eval_runtime"],
    }


def diverged(log: str) -> bool:
    """Whether a failed run failed because its rate was too high."""
    return "was not finite in" in log


@dataclass
class Job:
    """A run under way."""

    spec: Spec
    process: subprocess.Popen[bytes]
    folder: Path
    run: dict[str, Any]
    start: float


class Bench:
    """Does the runs, several at a time.

    Args:
        records: of the size.
        work: folder for data and runs.
        wheel: DeepForest's; None leaves the native check out.
    """

    def __init__(self, records: Records, work: Path, wheel: Path | None, gpu: bool):
        self.records, self.work, self.wheel, self.gpu = records, work, wheel, gpu
        self.jobs: dict[int, Job] = {}

    def next(self, blocks: list[tuple[str, str]]) -> Spec | None:
        """The first run that is neither done nor under way."""
        busy = {job.spec for job in self.jobs.values()}
        for data, optimizer in blocks:
            for spec in self.records.planned(data, optimizer):
                if spec not in busy and self.records.read(spec) is None:
                    return spec
        return None

    def start(self, spec: Spec) -> None:
        data = self.work / "data" / spec.data
        make_data(data, spec.data, self.records.size, self.wheel)
        folder = self.work / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run = run_file(self.records, spec, data / spec.split, folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        words, environment = command(folder / "run.yaml", self.gpu)
        with (folder / "run.log").open("wb") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.jobs[process.pid] = Job(spec, process, folder, run, time.perf_counter())

    def finish(self) -> None:
        """Wait for the next run to end and write its record."""
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
            found = {"metrics": zero, "steps": self.records.base["trainer"]["max_steps"], "diverged": True}
        else:
            raise SystemExit(f"{spec.name} failed; its log is {job.folder / 'run.log'}:\n{log[-2000:]}")
        self.records.write(spec, {
            **{key: getattr(spec, key) for key in ("data", "method", "optimizer", "lr", "seed", "split")},
            "size": self.records.size, "balancer": job.run["balancer"], **found,
            "logging_steps": self.records.base["trainer"]["logging_steps"],
            "wall_seconds": round(time.perf_counter() - job.start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mib": usage.ru_maxrss // 1024, "device": device(self.gpu), "versions": versions(),
            "settings": self.records.settings(spec.data),
        })  # fmt: skip
        shutil.rmtree(job.folder)
        scores = "  ".join(f"{task} {value:.3f}" for task, value in found["metrics"].items())
        print(f"{time.strftime('%H:%M:%S')}  {spec.name}  {scores}", flush=True)

    def run(self, blocks: list[tuple[str, str]], jobs: int) -> None:
        """All runs of the blocks that have no record yet."""
        try:
            while True:
                spec = self.next(blocks) if len(self.jobs) < jobs else None
                if spec is not None:
                    self.start(spec)
                elif self.jobs:
                    self.finish()
                else:
                    return
        finally:
            for job in self.jobs.values():
                job.process.kill()


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("torch", "torchvision", "deepspeed", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def device(gpu: bool) -> str:
    """What a run trained on."""
    if gpu:
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=("adamw", "sgd", "native"), help="parts (default: all, in order)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core (default 1)")
    parser.add_argument("--deepforest", type=Path, metavar="WHEEL", help="for the native check; left out without it")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run, for a try (give --results as well)")
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"), help="folder for data and runs (runs/ladder)")
    parser.add_argument("--results", type=Path, default=HERE / "results/ladder", help="folder of the records")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--page", type=Path, help="write the tables into this page, and plots into images/ beside it")
    args = parser.parse_args(argv)

    from allinone_ds.training.launcher import gpu_count

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that runs under way end too
    base = yaml.safe_load((HERE / f"ladder_{args.size}.yaml").read_text())
    if args.steps:
        base["trainer"] |= {"max_steps": args.steps, "logging_steps": min(args.steps, base["trainer"]["logging_steps"])}
    records = Records(args.results / args.size, base, args.size)
    parts = {"adamw": ("composed", "adamw"), "sgd": ("composed", "sgd"), "native": ("native", "adamw")}
    blocks = [parts[name] for name in args.only or parts]
    if not args.table:
        doable = [(data, optimizer) for data, optimizer in blocks if data != "native" or args.deepforest is not None]
        bench = Bench(records, args.work / args.size, args.deepforest, args.size == "gpu" and gpu_count() > 0)
        bench.run(doable, args.jobs)
    text = report(records, blocks)
    print(text)
    if args.page:
        plots = write_plots(records, args.page.parent / "images")
        pictures = "".join(f"\n![{shows}](images/{file.name})\n\n*{shows}.*\n" for file, shows in plots.items())
        write_page(args.page, text + pictures)


if __name__ == "__main__":
    main()
