"""Read the file that an offline W&B run leaves, with W&B's own reader: `wandb leet inspect`."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


@functools.cache
def records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(type, content) of every record of a run-ID.wandb file, in order; nested keys are joined by a dot."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [(record["type"], record[record["type"]]) for record in found]


def rows(file: Path) -> list[dict[str, Any]]:
    """Everything that was logged, one row a call of `log`."""
    return [content["item"] for kind, content in records(file) if kind == "history"]
