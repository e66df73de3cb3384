"""What do step time, memory and logs cost with 3 to 40 tasks in one run?

    python -m benchmarks.speed.many_tasks                        # 3, 10, 20 and 40 tasks, 4 of them per step, and all
    python -m benchmarks.speed.many_tasks --tasks 3 40 --per-step 4 --steps 60 --ranks 2

The tasks are copies of those of the demo, each with a head of its own, on the demo's backbone. The step time is the
median of the logs after the first, the memory the largest of a rank.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.report import make_parser, print_head, print_row, write_record


def run_file(count: int, per_step: int | None, steps: int, data: Path, folder: Path) -> dict[str, Any]:
    """Return the content of a run's file with `count` tasks."""
    from allinone_ds.run_config.yaml_files import read_yaml

    run = read_yaml("configs/runs/demo.yaml")
    kinds = list(run["tasks"].items())
    tasks = {f"{kinds[n % len(kinds)][0]}_{n:02}": kinds[n % len(kinds)][1] for n in range(count)}
    trainer = {**run["trainer"], "max_steps": steps, "logging_steps": max(steps // 6, 1), "save_strategy": "no"}
    content = {**run, "name": f"tasks{count}", "output_dir": str(folder), "data_root": str(data), "trainer": trainer}
    for task in tasks.values():
        task.pop("test", None)
    content["tasks"] = tasks
    if per_step is not None and per_step < count:
        content["sampling"] = {"tasks_per_step": per_step}
    return content


def measure(count: int, per_step: int | None, steps: int, ranks: int, data: Path) -> dict[str, Any]:
    """Train a run and return what its log says."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        file = Path(place) / "run.yaml"
        file.write_text(yaml.safe_dump(run_file(count, per_step, steps, data, folder), sort_keys=False))
        command = [sys.executable, "-m", "allinone_ds.cli", "train", str(file), "--nproc", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run with {count} tasks failed:\n{(done.stdout + done.stderr)[-3000:]}")
        logs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logs = [entry for entry in logs if "seconds/step" in entry]
    return {
        "tasks": count,
        "per_step": min(per_step or count, count),
        "seconds_per_step": statistics.median(entry["seconds/step"] for entry in logs[1:]),
        "peak_gib": max(entry["memory/peak_gib"] for entry in logs),
        "bytes_per_log": max(len(json.dumps(entry)) for entry in logs),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[3, 10, 20, 40], help="numbers of tasks")
    parser.add_argument("--per-step", type=int, default=4, help="tasks that a step runs")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("runs/demo_data"), help="folder of the demo data")
    args = parser.parse_args()
    from allinone_ds.data.demo import make_demo_data

    if not args.data.exists():
        make_demo_data(args.data)
    rows = []
    print_head("tasks", "per step", "s/step", "peak GiB", "bytes per log")
    for count in args.tasks:
        for per_step in (args.per_step, None):
            if per_step is None or per_step < count:
                row = measure(count, per_step, args.steps, args.ranks, args.data.resolve())
                rows.append(row)
                numbers = f"{row['seconds_per_step']:.3f}", f"{row['peak_gib']:.2f}", str(row["bytes_per_log"])
                print_row(str(row["tasks"]), str(row["per_step"]), *numbers)
    write_record(args.json, rows=rows)


if __name__ == "__main__":
    main()
