"""The outcome of a run, and its differences from the outcome of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common.forked_run import STEPS

VARYING = ("runtime", "images_per_second", "seconds/", "memory/")
"""Parts of the names of logged values that are different in every run."""

Outcome = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]


def outcome(output: Path, step: int = STEPS) -> Outcome:
    """Return the weights of a run after a step, and what it had logged by then without times and memory."""
    folder = output / f"checkpoint-{step}"
    weights = load_file(folder / "model.safetensors")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights, [steady(entry) for entry in history]


def steady(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a log entry that are equal in equal runs."""
    return {name: value for name, value in entry.items() if not any(word in name for word in VARYING)}


def differences(found: Outcome, expected: Outcome) -> str:
    """Describe how an outcome differs bitwise from the expected one; return "" if it does not."""
    weights, history = found
    if weights.keys() != expected[0].keys():
        return f"weights of different names: {sorted(weights.keys() ^ expected[0].keys())[:3]}"
    wrong = [name for name, value in weights.items() if not torch.equal(value, expected[0][name])]
    if wrong:
        return f"{len(wrong)} weights differ, among them {wrong[0]}"
    if history != expected[1]:
        return f"the logs differ: {history} instead of {expected[1]}"
    return ""
