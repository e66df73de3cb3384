"""Command-line options, Markdown tables and JSON records of the benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import describe_machine


def make_parser(text: str | None, *, worker: bool = False, rate: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the module's docstring and --json.

    Args:
        text: the docstring.
        worker: add the hidden --worker of benchmarks whose ranks run the same module.
        rate: add --rate.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description to this file")
    if rate:
        parser.add_argument("--rate", help="join two hosts by a link of this rate, for example 400mbit (needs root)")
    if worker:
        parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def write_record(path: Path | None, **content: Any) -> None:
    """Write figures and the machine's description as JSON; do nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": describe_machine(), **content}, indent=1) + "\n")


def print_row(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*columns: str) -> None:
    """Print the first two lines of a Markdown table."""
    print_row(*columns)
    print("|" + "---|" * len(columns), flush=True)


def quartiles_cell(quartiles: Sequence[float], digits: int = 3) -> str:
    """Return "LOW-HIGH"."""
    return "-".join(f"{value:.{digits}f}" for value in quartiles)
