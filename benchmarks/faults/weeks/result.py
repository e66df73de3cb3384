"""The result of a soak: verdict, record, table and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from allinone_ds.run_folder.names import EVENTS_FILE, WEIGHTS_FILE
from benchmarks.faults.weeks.compare import events_of, logged, losses, unequal
from benchmarks.faults.weeks.growth import MIB, verdict
from benchmarks.faults.weeks.run import NAN_EVERY
from benchmarks.faults.weeks.schedule import ENDED, SURVIVED

BYTES = ("memory", "checkpoints", "temporary files", "shared memory")


def result(out: Path, disk: Path) -> dict[str, Any]:
    """Return the record of a soak that has ended, with the comparison of both runs and what grew.

    Args:
        out: folder of the command.
        disk: folder of the runs.
    """
    record = json.loads((out / "record.json").read_text())
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    faulty, plain, steps = disk / "run", disk / "undisturbed", record["steps"]
    violations = list(record["violations"])
    found = logged(faulty / EVENTS_FILE)
    violations += unequal(found, logged(plain / EVENTS_FILE), steps - 1)
    weights, expected = (load_file(folder / WEIGHTS_FILE) for folder in (faulty / f"checkpoint-{steps}", plain))
    if wrong := [name for name, value in expected.items() if not torch.equal(weights[name], value)]:
        violations.append(f"{len(wrong)} weights differ after step {steps}, among them {wrong[0]}")
    skipped = _skipped(found)
    if skipped != (nan_steps := max(step for step, kind in found if kind == "training") // NAN_EVERY):
        violations.append(f"{skipped} steps left out a task whose loss was NaN, {nan_steps} had one")
    grown = verdict(samples)
    violations += [
        f"{row['quantity']} of {row['of']} grew over {row['over']}: {_change(row)}" for row in grown if row["grows"]
    ]
    entries = [event for event in events_of(faulty / EVENTS_FILE) if event["event"] == "log"]
    return {
        **{key: record[key] for key in ("settings", "commands", "hours", "steps", "undisturbed", "starts", "faults")},
        "seconds": record["seconds"],
        "entries": sum(map(len, found.values())),
        "nan_steps": skipped,
        "log_bytes_per_entry": round((faulty / EVENTS_FILE).stat().st_size / max(1, len(entries))),
        "growth": grown,
        "losses": {"faults": losses(faulty / EVENTS_FILE), "undisturbed": losses(plain / EVENTS_FILE)},
        "timeline": _thin([(sample["time"], sample["step"]) for sample in samples]),
        "memory": {
            f"rank {number}": _thin([(s["time"], s["of"][who]["memory"]) for s in samples if who in s["of"]])
            for number in range(4)
            if (who := f"rank {number}")
        },
        "violations": violations,
    }


def _skipped(found: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]) -> int:
    last = found[max(key for key in found if key[1] == "training")][-1]
    return sum(int(value) for name, value in last.items() if name.startswith("skipped/"))


def _thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    return list(points[:: max(1, len(points) // most)])


def _change(row: Mapping[str, Any]) -> str:
    unit, digits = (MIB, 1) if row["quantity"] in BYTES else (1, 0)
    first, last, slope = (row[key] / unit for key in ("first", "last", "per_hour"))
    return f"{first:.{digits}f} -> {last:.{digits}f}{' MiB' if unit > 1 else ''} ({slope:+.1f} per hour)"


def table(found: Mapping[str, Any]) -> str:
    """Return the faults by kind and what grew, as two tables in Markdown."""
    lines = ["| fault | injected | times | the run | longest recovery | most steps lost |", "|---|---|---|---|---|---|"]
    for kind, how in {**SURVIVED, **ENDED}.items():
        of_kind = [one for one in found["faults"] if one["kind"] == kind and "recovered_s" in one]
        if of_kind:
            went_on = sum(one["outcome"] == "went on" for one in of_kind)
            what = "went on" if went_on == len(of_kind) else "started again" if not went_on else f"went on: {went_on}"
            longest, lost = max(one["recovered_s"] for one in of_kind), max(one["steps_lost"] for one in of_kind)
            lines.append(f"| {kind} | {how} | {len(of_kind)} | {what} | {longest:.0f} s | {lost} |")
    how = f"the loss of one task on one rank, in every {NAN_EVERY}th step"
    lines.append(f"| NaN loss | {how} | {found['nan_steps']} | left out the task | | 0 |")
    lines += ["", "| | over | samples | hours | first quarter -> last quarter | |", "|---|---|---|---|---|---|"]
    for row in found["growth"]:
        grows = "GROWS" if row["grows"] else "does not grow"
        name = f"{row['quantity']} of {row['of']}"
        lines.append(f"| {name} | {row['over']} | {row['samples']} | {row['hours']:.2f} | {_change(row)} | {grows} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw loss, progress and memory of a soak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    figure, (loss, progress, memory) = plt.subplots(3, 1, figsize=(9, 9.5), height_ratios=(1.1, 1.3, 0.8))
    curves = found["losses"]
    loss.plot(*zip(*curves["undisturbed"], strict=True), color="#cc6633", lw=4, alpha=0.45, label="without faults")
    loss.plot(*zip(*curves["faults"], strict=True), color="#204060", linewidth=0.9, label="under faults")
    for start in found["starts"][1:-1]:
        loss.axvline(start["step"], color="#888888", linewidth=0.6, linestyle=":")
    loss.set(xlabel="optimizer step (dotted: a new start)", ylabel="sum of the task losses")
    loss.legend(frameon=False)
    ends = found["hours"] * 3600
    progress.plot(*zip(*[(t / 60, step) for t, step in found["timeline"]], strict=True), color="#204060", linewidth=1.2)
    kinds = [kind for kind in (*SURVIVED, *ENDED) if any(one["kind"] == kind for one in found["faults"])]
    for number, kind in enumerate(kinds):
        at = [one["at"] for one in found["faults"] if one["kind"] == kind and "at" in one]
        heights = [max((step for time, step in found["timeline"] if time <= moment), default=0) for moment in at]
        marker = "o" if kind in SURVIVED else "X"
        minutes = [t / 60 for t in at]
        progress.scatter(minutes, heights, marker=marker, s=45, color=f"C{number % 10}", label=kind, zorder=3)
    progress.axvline(ends / 60, color="#888888", linewidth=0.8)
    progress.set(xlabel="minutes (right of the line: the run without faults)", ylabel="optimizer step")
    progress.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    for number, (who, points) in enumerate(found["memory"].items()):
        minutes, used = [t / 60 for t, _ in points], [value / MIB for _, value in points]
        memory.plot(minutes, used, ".", color=f"C{number}", markersize=3)
        memory.plot([], [], color=f"C{number}", label=who)
    memory.axvline(ends / 60, color="#888888", linewidth=0.8)
    memory.set(xlabel="minutes", ylabel="resident memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(frameon=False, fontsize=8, ncol=4)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
