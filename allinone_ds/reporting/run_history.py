"""What the files of a run say: configuration, logs, events, metrics and pictures. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.metrics import TRAINED_PREFIX, Evaluation, nest
from allinone_ds.reporting.plots import series
from allinone_ds.run_folder.names import (
    CONFIG_FILE,
    CONSTANT_FILE,
    DETAILS,
    EVENTS_FILE,
    METRICS_FILE,
    PICTURES,
    WORST_PICTURES,
)


@dataclass
class Run:
    """Content of a run's folder.

    Attributes:
        folder: the run's folder.
        label: the run's name on a page.
        config: the resolved configuration; empty when the run has not begun.
        history: logs in the order of steps, each with `step`; of a step that was logged again, the last log.
        events: (step, text) of resumes, stops, warnings and notes, in the order of time.
        metrics: content of metrics.json; empty when the run has not ended.
        pictures: task -> files of drawn predictions.
        worst: task -> files of drawn predictions with the lowest scores, lowest first.
        constants: task -> metric -> what a predictor reaches that does not look at the image, where it was computed.
    """

    folder: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    worst: dict[str, list[Path]] = field(default_factory=dict)
    constants: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Names of the run's tasks."""
        return list(self.config.get("tasks", {})) or list(series(self.history, "loss/"))

    @property
    def evaluated(self) -> dict[str, Any]:
        """The flat record of the final evaluation, or of the last one of a run that has not ended."""
        logged = [entry for entry in self.history if f"{TRAINED_PREFIX}_score" in entry]
        return self.metrics if f"{TRAINED_PREFIX}_score" in self.metrics or not logged else logged[-1]

    @property
    def details(self) -> dict[str, dict[str, Any]]:
        """Task -> what the final evaluation found for each class."""
        return self.metrics.get(DETAILS, {})

    def evaluation(self, prefix: str = TRAINED_PREFIX) -> Evaluation:
        """Return the metrics of `evaluated`: of the trained weights, or of their average with AVERAGED_PREFIX."""
        return nest(self.evaluated, self.tasks, prefix)


def read_run(folder: str | Path) -> Run:
    """Read the files of a run; it may be in progress.

    Raises:
        ConfigError: the folder has neither a log nor metrics.

    Example::

        run = read_run("runs/demo")
        run.evaluation().metrics("detection")    # {"map50": 0.81, "map": 0.55}
    """
    folder = Path(folder)
    if not (folder / EVENTS_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        raise ConfigError(f"{folder}: has neither {EVENTS_FILE} nor {METRICS_FILE}; give the folder of a run")
    config = yaml.safe_load(_text(folder / CONFIG_FILE)) or {}
    return Run(
        folder=folder,
        label=str(config.get("name", folder.name)),
        config=config,
        history=_history(folder / EVENTS_FILE),
        events=_events(folder / EVENTS_FILE),
        metrics=json.loads(_text(folder / METRICS_FILE) or "{}"),
        pictures=_pictures(folder / PICTURES),
        worst=_pictures(folder / WORST_PICTURES),
        constants=json.loads(_text(folder / CONSTANT_FILE) or "{}"),
    )


def _pictures(folder: Path) -> dict[str, list[Path]]:
    pictures: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*-*.png")):
        pictures.setdefault(file.stem.rpartition("-")[0], []).append(file)
    return pictures


def _history(file: Path) -> list[dict[str, Any]]:
    """Return the logs by step. A resumed run replaces what it had logged after the step of its checkpoint."""
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for event in _lines(file):
        if event.get("event") == "begin":
            last = {key: entry for key, entry in last.items() if key[0] <= event["step"]}
        if event.get("event") == "log" and ("loss" in event or f"{TRAINED_PREFIX}_score" in event):
            last[event["step"], "loss" in event] = {
                key: math.nan if value is None else value
                for key, value in event.items()
                if key not in ("event", "time")
            }
    return [last[key] for key in sorted(last, key=lambda key: (key[0], not key[1]))]


def _events(file: Path) -> list[tuple[int, str]]:
    """Return (step, text) of every restart, stop, warning and note."""
    found, begun = [], False
    for event in _lines(file):
        step = event.get("step", 0)
        match event.get("event"):
            case "begin":
                found += [(step, "started again")] if begun else []
                begun = True
            case "stopped":
                found.append((step, f"saved and stopped by {event.get('signal')}"))
            case "warning" | "note":
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
