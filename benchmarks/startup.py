"""Where the time from the command to the first optimizer step goes.

    python benchmarks/startup.py                            # the demo's run on 2 CPU ranks, three times
    python benchmarks/startup.py --json benchmarks/results/startup.json

Starts the demo as `allinone-ds demo` does, on data that is there already, and looks at the clocks where one phase ends
and the next begins. Phases of the ranks are those of rank 0; the figure of each is the median over the starts. The
processor's seconds, of the one process whose phase it is, hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

PHASES = (
    ("command", "interpreter, command line and the run's file"),
    ("launcher", "launcher process, until it starts the ranks"),
    ("imports", "interpreter and imports of a rank"),
    ("arguments", "training arguments and process group"),
    ("data", "opening the data"),
    ("model", "building the model"),
    ("trainer", "making the trainer"),
    ("engine", "DeepSpeed engine, up to the start of training"),
    ("first step", "the first optimizer step"),
)


def command(argv: list[str]) -> int:
    """`allinone-ds ARGV`, whose ranks run this file."""
    from allinone_ds import cli, commands
    from allinone_ds.training import launcher as launch

    whole = launch.launch_command

    def instrumented(*args: Any) -> list[str]:
        words = whole(*args)
        module = words.index("--module")
        Path(os.environ["MARKS"]).write_text(json.dumps([time.time(), time.process_time()]))
        return [*words[:module], __file__, "--rank", *words[module + 2 :]]

    launch.launch_command = instrumented
    commands._summary = lambda *_: None  # the run ends with its first step
    return cli.main(argv)


def rank(argv: list[str]) -> int:
    """`python -m allinone_ds.train ARGV` up to its first step: notes [phase, clock, this process's seconds]."""
    me = psutil.Process()
    launcher = me.parent().cpu_times()  # type: ignore[union-attr]
    begun = me.create_time()
    marks: list[tuple[str, float, float]] = []

    def then(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            marks.append((name, time.time(), time.process_time()))
            if name == PHASES[-1][0]:
                finish()
            return result

        return call

    def finish() -> None:
        if os.environ["RANK"] == "0":
            place = Path(os.environ["MARKS"])
            found = {"begun": begun, "launcher": launcher.user + launcher.system, "marks": marks}
            place.write_text(json.dumps({**found, "command": json.loads(place.read_text())}))
        sys.modules["torch"].distributed.barrier()
        os._exit(0)

    def imported() -> None:
        """Called where `train.main` has imported everything and lets the collector work again."""
        collect()
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
            setattr(owner, name, then(phase, getattr(owner, name)))

    from allinone_ds import train

    collect, gc.enable = gc.enable, imported
    return train.main(argv)


def start(folder: Path, ranks: int) -> dict[str, tuple[float, float]]:
    """Start the demo once; seconds by the clock and of the processor, by phase."""
    marks = folder / "marks.json"
    words = ["demo", "--steps=1", f"--nproc={ranks}", f"--data={folder / 'data'}", f"--output={folder / 'run'}"]
    before = time.time()
    subprocess.run(
        [sys.executable, __file__, "--command", *words],
        check=True,
        env={**os.environ, "MARKS": str(marks)},
        stdout=subprocess.DEVNULL,
    )
    found = json.loads(marks.read_text())
    ended, used = found["command"]
    phases = {"command": (ended - before, used), "launcher": (found["begun"] - ended, found["launcher"])}
    clock, used = found["begun"], 0.0
    for name, now, process in found["marks"]:
        phases[name] = (now - clock, process - used)
        clock, used = now, process
    return phases


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--command"]:
        raise SystemExit(command(sys.argv[2:]))
    if sys.argv[1:2] == ["--rank"] or sys.argv[2:3] == ["--rank"]:  # the launcher puts --local_rank first
        raise SystemExit(rank([word for word in sys.argv[1:] if word != "--rank"]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    from allinone_ds.data.demo import DEMO_SIZES, make_demo_data

    with tempfile.TemporaryDirectory() as folder:
        make_demo_data(Path(folder) / "data", sizes=DEMO_SIZES, progress=False)
        starts = [start(Path(folder), args.ranks) for _ in range(args.starts)]
    rows = {name: [statistics.median(s[name][kind] for s in starts) for kind in (0, 1)] for name, _ in PHASES}
    print("| phase | what | s | processor s |\n|---|---|---|---|")
    for name, what in PHASES:
        print(f"| {name} | {what} | {rows[name][0]:.2f} | {rows[name][1]:.2f} |")
    totals = [sum(row[kind] for row in rows.values()) for kind in (0, 1)]
    print(f"| all | | {totals[0]:.2f} | {totals[1]:.2f} |")
    if args.json:
        found = {"machine": describe_machine(), "ranks": args.ranks, "starts": starts, "phases": rows, "all": totals}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
