"""Compare what two runs logged: every entry of every start must be equal, bit for bit."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import steady

Logged = Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]
"""(step, "training" or "evaluation") -> the entries; several where a step was run again after a new start."""


def events_of(file: Path) -> list[dict[str, Any]]:
    """Return the events of a run's log.jsonl, without lines that a killed run left unfinished."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def logged(file: Path) -> Logged:
    """Return what a run logged, without times, memory and the fraction of the run that has passed."""
    entries: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events_of(file):
        if event["event"] == "log" and "train_runtime" not in event:  # which sums up one start
            kind = "training" if "loss" in event else "evaluation"
            values = {key: value for key, value in event.items() if key not in ("event", "time", "epoch")}
            entries[event["step"], kind].append(steady(values))
    return entries


def unequal(found: Logged, expected: Logged, last: int) -> list[str]:
    """Describe every entry of `found`, up to a step, that is missing in either run or differs from that of `expected`.

    Args:
        found: of the run with faults.
        expected: of the run without.
        last: the last step to compare.
    """
    lines = []
    for key in sorted({key for key in (*found, *expected) if key[0] <= last}):
        step, kind = key
        if key not in found or key not in expected:
            where = "faults" if key not in found else "no faults"
            lines.append(f"step {step}: the run with {where} has no {kind} entry")
            continue
        wanted = expected[key][-1]
        for entry in (*found[key], *expected[key][:-1]):
            different = sorted(name for name in {*entry, *wanted} if entry.get(name, key) != wanted.get(name, key))
            if different:
                name = different[0]
                values = f"{entry.get(name)} instead of {wanted.get(name)}"
                lines.append(f"step {step}, {kind}: {len(different)} values differ, among them {name}, {values}")
    return lines


def losses(file: Path, points: int = 400) -> list[tuple[int, float]]:
    """Return (step, loss) of a run, of each step the last entry, and of many steps about `points`."""
    by_step = {e["step"]: e["loss"] for e in events_of(file) if e["event"] == "log" and e.get("loss") is not None}
    steps = sorted(by_step)
    return [(step, by_step[step]) for step in steps[:: max(1, len(steps) // points)]]
