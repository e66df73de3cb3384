"""Writes docs/gpu-measured.md from the records of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.launch import ROOT
from benchmarks.gpu.part import PARTS

PAGE = ROOT / "docs" / "gpu-measured.md"
COLUMNS = {
    "machine": ("what", "gib_per_s", "flops", "difference"),
    "exact": ("case", "norm", "cases", "difference", "limit", "passed", "error"),
    "steps": ("side", "batch", "stage", "mode", "overlap", "compiled", "seconds", "ratio", "utilisation", "of_matmul",
              "between_ms", "peak_gib", "planned_gib", "error"),
    "waits": ("where", "owner", "place", "count", "ours", "all"),
    "trace": ("stage", "mode", "kernels", "ms", "busy_ms", "longest_gap_ms", "kernel", "calls"),
    "order": ("case", "difference", "unordered", "error"),
    "offload": ("side", "batch", "stage", "mode", "seconds", "ratio", "between_ms", "peak_gib", "planned_gib", "error"),
    "saving": ("what", "seconds", "longest_step", "status", "difference"),
    "heads": ("head", "loss", "loss_bf16", "gradient_cosine", "gradient_ratio", "steps", "seconds", "score",
              "status", "error"),
    "ranks": ("case", "difference", "limit", "passed", "norms", "error"),
    "large": ("backbone", "stage", "checkpointing", "batch", "fits", "seconds", "peak_gib", "planned_gib"),
    "loader": ("what", "side", "images_per_s", "error"),
}  # fmt: skip
"""What the page shows of each part's rows."""


def write_page(folder: Path) -> None:
    """Write the page."""
    machine = next(iter(read(folder / "machine.jsonl")), {})
    name = machine.get("accelerator") or machine.get("processor", "an unknown machine")
    versions = [f"{part} {machine.get(part)}" for part in ("torch", "deepspeed", "transformers", "cuda")]
    lines = [
        "# Measured on a GPU",
        "",
        "After this page you know what `python -m benchmarks.gpu` found on one machine; [GPUs](gpu.md) says what it",
        "means. The page is written by `python -m benchmarks.gpu --out DIR --table`; do not edit it.",
        "",
        ", ".join([f"{name}, {machine.get('device_gib', '?')} GiB", *versions]) + ".",
    ]
    ends = {row["part"]: row for row in read(folder / "parts.jsonl")}
    for part, about in PARTS.items():
        rows = list(read(folder / f"{part}.jsonl"))
        rows = counted(rows) if part == "exact" else rows
        if rows:
            end = ends.get(part, {})
            lines += ["", f"## {about.question}", "", f"`--only {part}`: {end.get('status', '?')}, "
                      f"{end.get('seconds', '?')} s.", "", *table(rows, COLUMNS[part])]  # fmt: skip
    PAGE.write_text("\n".join(lines) + "\n")


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per norm and limit with the number of cases that passed and the largest difference; then those
    that did not pass or were not run."""
    passed = [row for row in rows if row.get("passed")]
    found = []
    for norm, limit in dict.fromkeys((row["norm"], row["limit"]) for row in passed):
        differences = [row["difference"] for row in passed if (row["norm"], row["limit"]) == (norm, limit)]
        found.append({"norm": norm, "cases": len(differences), "difference": max(differences), "limit": limit,
                      "passed": True})  # fmt: skip
    return found + [row for row in rows if not row.get("passed")]


def read(file: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows of a file; none if it does not exist."""
    for line in file.read_text().splitlines() if file.exists() else ():
        yield json.loads(line)


def table(rows: list[dict[str, Any]], columns: Iterable[str]) -> list[str]:
    """Return the lines of a table, without columns that are empty in all rows."""
    shown = [column for column in columns if any(row.get(column) not in (None, "", []) for row in rows)]
    rows = [row for row in rows if len(shown) == 1 or any(row.get(column) is not None for column in shown[1:])]
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in shown)} |", "|" + "---|" * len(shown)]
    return lines + [f"| {' | '.join(cell(row.get(column)) for column in shown)} |" for row in rows]


def cell(value: Any) -> str:
    """Return a value as a cell."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.3f}".rstrip("0").rstrip(".")
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value).replace("|", "/").replace("\n", " ")
