"""The records of all runs of a size, in one file: one JSON object per line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ladder.data import describe
from benchmarks.ladder.plan import BLOCKS, CHOICE_SEED, CLIPPED, RATES, SEEDS, SGD_RATES, TASKS_OF, Spec


def base_runs(size: str) -> dict[str, dict[str, Any]]:
    """Return, for each kind of data of a size, the content of its runs without their method."""
    folder = Path(__file__).parent
    files = {data: folder / (f"{size}_joint.yaml" if data == "joint" else f"{size}.yaml") for data in TASKS_OF}
    return {data: yaml.safe_load(file.read_text()) for data, file in files.items() if file.exists()}


class Records:
    """The records of one size, and the decisions that follow from them.

    A finished run appends one line. Lines that are cut off, lack a field, or belong to other settings are ignored; of
    several valid records of a run the last one is used.

    Args:
        file: of the records, `results/ladder_SIZE.jsonl`.
        bases: data -> content of the run without its method, `SIZE.yaml` or `SIZE_joint.yaml`.
        size: its name.
    """

    def __init__(self, file: Path, bases: dict[str, dict[str, Any]], size: str):
        self.file, self.bases, self.size = file, bases, size
        self._stamp: tuple[int, int] | None = None
        self._lines: dict[Spec, list[dict[str, Any]]] = {}

    def earlier(self) -> Records:
        """Return the records of a segmentation head that started from a bias of zero; no run adds to them."""
        bases = copy.deepcopy(self.bases)
        for base in bases.values():
            base["tasks"]["segmentation"]["options"].pop("prior", None)
        return Records(self.file, bases, self.size)

    def settings(self, data: str) -> str:
        """Return a digest of what comparable runs have in common: the base run and the data."""
        text = json.dumps([self.bases[data], describe(data, self.size)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def read(self, spec: Spec) -> dict[str, Any] | None:
        """Return the record of a run; None if there is no valid one."""
        self._load()
        valid = (record for record in reversed(self._lines.get(spec, [])) if self._is_valid(spec, record))
        return next(valid, None)

    def append(self, spec: Spec, record: dict[str, Any]) -> None:
        """Add the record of a finished run, with one write."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**asdict(spec), "size": self.size, **record}).encode() + b"\n"
        with self.file.open("ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # the last line was cut off
            file.write(line)
            os.fsync(file.fileno())

    def _is_valid(self, spec: Spec, record: dict[str, Any]) -> bool:
        try:
            comparable = record["settings"] == self.settings(spec.data)
            comparable &= record["steps"] == self.bases[spec.data]["trainer"]["max_steps"]
            return comparable and all(isinstance(record["metrics"][task], float) for task in spec.tasks)
        except (KeyError, TypeError):
            return False

    def _load(self) -> None:
        if not self.file.exists():
            self._stamp, self._lines = None, {}
            return
        status = self.file.stat()
        if self._stamp == (status.st_mtime_ns, status.st_size):
            return
        self._stamp, self._lines = (status.st_mtime_ns, status.st_size), {}
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                self._lines.setdefault(Spec(**{field.name: record[field.name] for field in fields(Spec)}), []).append(
                    record
                )
            except (ValueError, KeyError, TypeError):
                continue

    # ---- decisions ----

    def rates(self, optimizer: str, method: str) -> tuple[float, ...]:
        """Return the learning rates that are tried for a method, in rising order."""
        return SGD_RATES[method in CLIPPED] if optimizer == "sgd" else RATES[self.size]

    def choice(self, data: str, optimizer: str, method: str) -> list[Spec]:
        """Return the runs that decide a method's learning rate."""
        return [Spec(data, optimizer, method, lr, CHOICE_SEED, "validation") for lr in self.rates(optimizer, method)]

    def chosen(self, data: str, optimizer: str, method: str) -> float | None:
        """Return the best learning rate of a method; None while a record is missing."""
        found = [(self.read(spec), spec.lr) for spec in self.choice(data, optimizer, method)]
        scores = [(statistics.fmean(record["metrics"].values()), lr) for record, lr in found if record is not None]
        return max(scores)[1] if len(scores) == len(found) else None

    def static_weights(self, data: str, optimizer: str) -> dict[str, float] | None:
        """Return the static weights w_t = sqrt(mean_s m_s^2) / m_t.

        m_t is task t's median norm in the plain sum's validation run at its chosen rate. The weights equalize the
        median norms and keep their root mean square.

        Returns:
            Task -> weight; None while the plain sum's rate is not chosen, or if it diverged at every rate.
        """
        lr = self.chosen(data, optimizer, "sum")
        record = None if lr is None else self.read(Spec(data, optimizer, "sum", lr, CHOICE_SEED, "validation"))
        if record is None or record["diverged"]:
            return None
        norms = {task: record["norms"][task]["median"] for task in TASKS_OF[data]}
        scale = statistics.fmean(norm**2 for norm in norms.values()) ** 0.5
        return {task: float(f"{scale / norm:.4g}") for task, norm in norms.items()}

    def planned(self, data: str, optimizer: str) -> Iterator[Spec]:
        """Yield the runs of a block in order, as far as the records determine them."""
        methods = BLOCKS[data, optimizer]
        first = sorted(methods, key=lambda method: method != "sum")  # the static weights depend on the plain sum
        for method in first:
            if method != "static" or self.static_weights(data, optimizer) is not None:
                yield from self.choice(data, optimizer, method)
        for seed in SEEDS[data]:
            for method in methods:
                lr = self.chosen(data, optimizer, method)
                if lr is not None:
                    yield Spec(data, optimizer, method, lr, seed, "test")
