"""Where does the time between the command and the first optimizer step go?

    python -m benchmarks.speed.startup          # the demo's run on 2 CPU ranks, three times: 1 minute on 2 cores
    python -m benchmarks.speed.startup --json benchmarks/results/startup.json

Starts the demo as `allinone-ds demo` does, on data that exists already, and reads the clocks where one phase ends and
the next begins. Phases of the ranks are those of rank 0; the figure of each phase is the median over the starts.
Processor seconds are those of the one process that runs the phase; other load on the machine changes them little.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.launch import worker_environment
from benchmarks.common.report import make_parser, print_head, print_row, write_record

PHASES = {
    "command": "interpreter, command line and the run's file",
    "launcher": "launcher process, until it starts the ranks",
    "imports": "interpreter and imports of a rank",
    "arguments": "training arguments and process group",
    "data": "opening the data",
    "model": "building the model",
    "trainer": "constructing the trainer",
    "engine": "DeepSpeed engine, up to the start of training",
    "first step": "the first optimizer step",
}
MODULE = "benchmarks.speed.startup"


def run_command(argv: list[str]) -> int:
    """Run `allinone-ds ARGV` with ranks that run this module."""
    from allinone_ds import cli, commands
    from allinone_ds.training import launcher

    launch_command = launcher.launch_command

    def command_of_this_module(*args: Any) -> list[str]:
        words = launch_command(*args)
        module = words.index("--module") + 1
        Path(os.environ["MARKS"]).write_text(json.dumps([time.time(), time.process_time()]))
        return [*words[:module], MODULE, "--rank", *words[module + 1 :]]

    launcher.launch_command = command_of_this_module
    commands.print_summary = lambda *_: None  # the run ends with its first step and leaves nothing to summarize
    return cli.main(argv)


def run_rank(argv: list[str]) -> int:
    """Run `python -m allinone_ds.train ARGV` up to its first step; note (phase, clock, processor seconds)."""
    process = psutil.Process()
    launcher = process.parent().cpu_times()  # type: ignore[union-attr]
    begun = process.create_time()
    marks: list[tuple[str, float, float]] = []

    def mark_after(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            marks.append((name, time.time(), time.process_time()))
            if name == "first step":
                finish()
            return result

        return call

    def finish() -> None:
        if os.environ["RANK"] == "0":
            target = Path(os.environ["MARKS"])
            content = {"begun": begun, "launcher": launcher.user + launcher.system, "marks": marks}
            target.write_text(json.dumps({**content, "command": json.loads(target.read_text())}))
        sys.modules["torch"].distributed.barrier()
        os._exit(0)

    def after_imports() -> None:
        """Replace `gc.enable`, which `train.main` calls when all imports are done."""
        enable_gc()
        marks.append(("imports", time.time(), time.process_time()))
        run = sys.modules["allinone_ds.training.run"]
        trainer = run.AllInOneTrainer
        for phase, owner, name in (
            ("arguments", run, "arguments_from_config"),
            ("data", run, "open_test_data"),
            ("model", run, "build_model"),
            ("trainer", trainer, "__init__"),
            ("engine", trainer, "_prepare_for_training"),
            ("first step", trainer, "training_step"),
        ):
            setattr(owner, name, mark_after(phase, getattr(owner, name)))

    from allinone_ds import train

    enable_gc, gc.enable = gc.enable, after_imports
    return train.main(argv)


def time_start(folder: Path, ranks: int) -> dict[str, tuple[float, float]]:
    """Start the demo once; return phase -> (seconds by the clock, seconds of the processor)."""
    target = folder / "marks.json"
    words = ["demo", "--steps=1", f"--nproc={ranks}", f"--data={folder / 'data'}", f"--output={folder / 'run'}"]
    environment = {**os.environ, **worker_environment(), "MARKS": str(target)}
    before = time.time()
    command = [sys.executable, "-m", MODULE, "--command", *words]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    content = json.loads(target.read_text())
    ended, used = content["command"]
    phases = {"command": (ended - before, used), "launcher": (content["begun"] - ended, content["launcher"])}
    clock, used = content["begun"], 0.0
    for name, now, processor in content["marks"]:
        phases[name] = (now - clock, processor - used)
        clock, used = now, processor
    return phases


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--command"]:
        raise SystemExit(run_command(sys.argv[2:]))
    if "--rank" in sys.argv[1:3]:  # the launcher puts --local_rank first
        raise SystemExit(run_rank([word for word in sys.argv[1:] if word != "--rank"]))
    parser = make_parser(__doc__)
    parser.add_argument("--starts", type=int, default=3, help="default: 3")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    args = parser.parse_args()
    from allinone_ds.data.demo import DEMO_SIZES, make_demo_data

    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(Path(folder) / "data", sizes=DEMO_SIZES, progress=False)
        starts = [time_start(Path(folder), args.ranks) for _ in range(args.starts)]
    rows = {name: [statistics.median(start[name][kind] for start in starts) for kind in (0, 1)] for name in PHASES}
    totals = [sum(row[kind] for row in rows.values()) for kind in (0, 1)]
    print_head("phase", "what", "s", "processor s")
    for name, what in PHASES.items():
        print_row(name, what, f"{rows[name][0]:.2f}", f"{rows[name][1]:.2f}")
    print_row("all", "", f"{totals[0]:.2f}", f"{totals[1]:.2f}")
    write_record(args.json, ranks=args.ranks, starts=starts, phases=rows, all=totals)


if __name__ == "__main__":
    main()
