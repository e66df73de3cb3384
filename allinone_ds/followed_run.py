"""Start a run from the command line, show its progress, and print what came out. Quick to import."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from allinone_ds.reporting.tables import metrics_table
from allinone_ds.strict import expand_path

plain_console = partial(Console, highlight=False, soft_wrap=True, markup=False, emoji=False)
console = plain_console()


def folder_of(content: dict[str, Any]) -> Path:
    # the ranks validate the file; only the folder of the log is needed here
    return Path(expand_path(content.get("output_dir") or Path("runs") / str(content.get("name", "run"))))


def run_and_follow(config: str, flags: Sequence[str], content: dict[str, Any], ranks: int) -> float:
    """Start the launcher, show the progress of the run until it ends, and return the seconds that it took."""
    from allinone_ds.reporting.text import clock, losses_line, metrics_line, task_losses
    from allinone_ds.training.launcher import follow_run, launch_command, launch_environment

    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        job = bar.add_task(f"training on {ranks} ranks", total=None, state="starting")
        started: dict[str, float] = {}

        def show(event: dict[str, Any]) -> None:
            step = event["step"]
            if event["event"] == "begin":
                started.update(step=step, time=event["time"], max_steps=event["max_steps"])
                bar.update(job, total=event["max_steps"], completed=step, state=f"step {step}/{event['max_steps']}")
            elif event["event"] == "warning":
                console.print(f"warning: {event['message']}", style="yellow")
            elif event["event"] == "note":
                console.print(event["message"])
            elif event["event"] == "end":
                bar.update(job, state="evaluating and drawing")
            elif "eval_score" in event:
                console.print(f"step {step}  {metrics_line(event)}")
            elif task_losses(event):
                pace = (event["time"] - started["time"]) / max(step - started["step"], 1)
                total = int(started["max_steps"])
                line = f"step {step}/{total}  {clock(pace * (total - step))} left  loss {losses_line(event)}"
                bar.update(job, completed=step, state=line)
                if not console.is_terminal:
                    console.print(line)

        trainer = content.get("trainer")
        options = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # each of them enables it
        compiles = isinstance(trainer, dict) and any(trainer.get(key) for key in options)
        environment = launch_environment(ranks, compiles)
        again = shlex.join(
            ["allinone-ds", "train", config, *(flag for flag in flags if flag != "--resume"), "--resume"]
        )
        follow_run(launch_command(config, flags, ranks), environment, folder_of(content), show, again)
    return time.perf_counter() - start


def print_summary(folder: Path, seconds: float) -> None:
    from allinone_ds.evaluation.metrics import AVERAGED_PREFIX
    from allinone_ds.reporting.run_history import read_run
    from allinone_ds.reporting.text import clock
    from allinone_ds.run_folder.names import METRICS_FILE, PAGE_FILE, PLOTS, REPORT_FILE, WEIGHTS_FILE

    run = read_run(folder)
    title = f"{run.metrics['steps']} steps, {clock(seconds)} in total"
    console.print(metrics_table(run.evaluation(), title, run.constants))
    if (averaged := run.evaluation(AVERAGED_PREFIX)).tasks:
        console.print(metrics_table(averaged, "averaged weights"))
    named = {
        "weights": WEIGHTS_FILE,
        "metrics": METRICS_FILE,
        "plots": PLOTS,
        "predictions": PAGE_FILE,
        "report": REPORT_FILE,
    }
    for what, name in named.items():
        if (folder / name).exists():
            console.print(f"{what:12} {folder / name}")
