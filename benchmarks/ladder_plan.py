"""Which runs `ladder.py` does, in which order, and their records."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_data import describe

TASKS = {"detection": "map50", "segmentation": "miou", "classification": "top1"}
"""The tasks and the metric that each is judged by."""
METHODS: dict[str, dict[str, Any]] = {
    "sum": {"name": "sum"},
    "global_clip": {"name": "global_clip", "max_norm": 0.1},
    "task_clip": {"name": "task_clip", "max_norm": 0.1},
    "tbgc": {"name": "tbgc", "max_norm": 0.1},
    "tbgc_max": {"name": "tbgc", "target": "max", "rescale": "always"},
    "tbgc_mean": {"name": "tbgc", "target": "mean", "rescale": "always"},
    "static": {"name": "static"},  # its weights are measured, see `static_weights`
}
"""The `balancer:` block of every multi-task method; max_norm is the paper's."""
RATES = {"cpu": (5e-4, 1.5e-3, 4.5e-3), "gpu": (1e-4, 3e-4, 1e-3)}
"""AdamW's learning rates to choose from, by size; all methods get the same, as it does not feel a gradient's size."""
SGD_RATES = {True: (0.03, 0.1, 0.3, 1.0, 3.0), False: (0.003, 0.01, 0.03, 0.1, 0.3)}
"""Those of SGD, which does: for gradients that are clipped to a norm of 0.1, and for raw ones."""
SINGLE = {f"single_{task}": task for task in TASKS}
CLIPPED = ("global_clip", "task_clip", "tbgc")
BLOCKS: dict[tuple[str, str], list[str]] = {
    ("composed", "adamw"): [*SINGLE, *METHODS],
    ("composed", "sgd"): [*SINGLE, "sum", "global_clip", "task_clip", "tbgc", "static"],
    ("native", "adamw"): ["single_detection", "sum", "tbgc"],
}
"""What is compared on which data under which optimizer, in the order in which it is done."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.0},
}
"""What an optimizer changes in the `trainer:` block."""
CHOICE_SEED = 100  # not one of the seeds that count
SEEDS = range(5)


@dataclass(frozen=True)
class Spec:
    """One run."""

    data: str
    optimizer: str
    method: str
    lr: float
    seed: int
    split: str  # that it is scored on

    @property
    def name(self) -> str:
        return f"{self.data}-{self.optimizer}-{self.method}-lr{self.lr:g}-seed{self.seed}-{self.split}"

    @property
    def tasks(self) -> list[str]:
        return [SINGLE[self.method]] if self.method in SINGLE else list(TASKS)


class Records:
    """The records of one size, in a folder: one JSON file a run.

    Args:
        folder: of the records.
        base: the size's run, `ladder_SIZE.yaml`.
        size: its name.
    """

    def __init__(self, folder: Path, base: dict[str, Any], size: str):
        self.folder, self.base, self.size = folder, base, size

    def settings(self, data: str) -> str:
        """A digest of all that two comparable runs must share: the base run and the data."""
        text = json.dumps([self.base, describe(data, self.size)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def path(self, spec: Spec) -> Path:
        return self.folder / f"{spec.name}.json"

    def read(self, spec: Spec) -> dict[str, Any] | None:
        """The record of a run; None when there is no good one."""
        try:
            record = json.loads(self.path(spec).read_text())
            same = record["settings"] == self.settings(spec.data)
            same &= record["steps"] == self.base["trainer"]["max_steps"]
            whole = all(isinstance(record["metrics"][task], float) for task in spec.tasks)
            return record if same and whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, spec: Spec, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.path(spec).with_suffix(".tmp")
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
        scratch.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
        scratch.replace(self.path(spec))

    # ---- what follows from them ----

    def rates(self, optimizer: str, method: str) -> tuple[float, ...]:
        """The learning rates a method may choose from, rising."""
        return RATES[self.size] if optimizer == "adamw" else SGD_RATES[method in CLIPPED]

    def choice(self, data: str, optimizer: str, method: str) -> list[Spec]:
        """The runs that decide a method's learning rate."""
        return [Spec(data, optimizer, method, lr, CHOICE_SEED, "validation") for lr in self.rates(optimizer, method)]

    def chosen(self, data: str, optimizer: str, method: str) -> float | None:
        """The best of the rates; None while one is missing."""
        found = [(self.read(spec), spec.lr) for spec in self.choice(data, optimizer, method)]
        scores = [(statistics.fmean(record["metrics"].values()), lr) for record, lr in found if record is not None]
        return max(scores)[1] if len(scores) == len(found) else None

    def static_weights(self, data: str, optimizer: str) -> dict[str, float] | None:
        """Weights inversely proportional to the median norms m_t of the plain sum's validation run at its chosen rate,
        times what keeps the root mean square of the tasks' norms: w_t = sqrt(mean_s m_s^2) / m_t.

        None while the plain sum's rate is not chosen, or when it diverged at all of them.
        """
        lr = self.chosen(data, optimizer, "sum")
        record = None if lr is None else self.read(Spec(data, optimizer, "sum", lr, CHOICE_SEED, "validation"))
        if record is None or record["diverged"]:
            return None
        norms = {task: record["norms"][task]["median"] for task in TASKS}
        scale = statistics.fmean(norm**2 for norm in norms.values()) ** 0.5
        return {task: float(f"{scale / norm:.4g}") for task, norm in norms.items()}

    def planned(self, data: str, optimizer: str) -> Iterator[Spec]:
        """The runs of a block that are known by now, in order; a method without a rate has no seeds yet."""
        methods = BLOCKS[data, optimizer]
        first = sorted(methods, key=lambda method: method != "sum")  # static weights wait for it
        for method in first:
            if method != "static" or self.static_weights(data, optimizer) is not None:
                yield from self.choice(data, optimizer, method)
        for seed in SEEDS:
            for method in methods:
                lr = self.chosen(data, optimizer, method)
                if lr is not None:
                    yield Spec(data, optimizer, method, lr, seed, "test")
