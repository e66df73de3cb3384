"""What the files of a run tell: configuration, logs, events, metrics and pictures. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.names import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, PICTURES


@dataclass
class Run:
    """What a run's folder tells.

    Attributes:
        folder: of the run.
        label: a name that no other run of the page has.
        config: the resolved configuration; empty when the run has not begun.
        history: logs in the order of steps, the last one that was written of each; `step` in each.
        events: (step, what happened), in the order of time: resumes, stops, warnings.
        metrics: of the end; empty when the run has not ended.
        pictures: files of predictions by task.
    """

    folder: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.config.get("tasks", {}))

    def evaluation(self) -> dict[str, Any]:
        """Metrics of the end, else of the last evaluation."""
        found = [entry for entry in self.history if "eval_score" in entry]
        return self.metrics if "eval_score" in self.metrics else (found[-1] if found else {})


def read_run(folder: str | Path) -> Run:
    """Read what lies in a run's folder.

    Raises:
        ConfigError: neither a log nor metrics are in it.
    """
    folder = Path(folder)
    if not (folder / EVENTS_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        raise ConfigError(f"{folder}: neither {EVENTS_FILE} nor {METRICS_FILE} in it; give the folder of a run")
    config = yaml.safe_load(_text(folder / CONFIG_FILE)) or {}
    pictures: dict[str, list[Path]] = {}
    for file in sorted((folder / PICTURES).glob("*-*.png")):
        pictures.setdefault(file.stem.rpartition("-")[0], []).append(file)
    return Run(
        folder=folder,
        label=str(config.get("name", folder.name)),
        config=config,
        history=_history(folder / EVENTS_FILE),
        events=_events(folder / EVENTS_FILE),
        metrics=json.loads(_text(folder / METRICS_FILE) or "{}"),
        pictures=pictures,
    )


def _history(file: Path) -> list[dict[str, Any]]:
    """Logs by step. Where a run is resumed, what it had logged beyond that step no longer counts."""
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for event in _lines(file):
        if event.get("event") == "begin":
            last = {key: entry for key, entry in last.items() if key[0] <= event["step"]}
        if event.get("event") == "log" and ("loss" in event or "eval_score" in event):
            last[event["step"], "loss" in event] = {
                key: math.nan if value is None else value
                for key, value in event.items()
                if key not in ("event", "time")
            }
    return [last[key] for key in sorted(last, key=lambda key: (key[0], not key[1]))]


def _events(file: Path) -> list[tuple[int, str]]:
    """What an operator wants to know of."""
    found = []
    for number, event in enumerate(_lines(file)):
        step = event.get("step", 0)
        match event.get("event"):
            case "begin" if number:
                found.append((step, "started again"))
            case "stopped":
                found.append((step, f"saved and stopped by {event.get('signal')}"))
            case "warning":
                found.append((step, str(event.get("message"))))
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in _text(file).splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        if isinstance(event, dict):
            yield event


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def flat_values(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(flat_values(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text in ("nan", "inf") or text[0] == "-"
