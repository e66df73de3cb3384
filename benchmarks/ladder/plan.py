"""The runs of the ladder: methods, learning rates, seeds and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASKS = {"detection": "map50", "segmentation": "miou", "classification": "top1"}
"""Task -> the metric by which it is scored."""
METHODS: dict[str, dict[str, Any]] = {
    "sum": {"name": "sum"},
    "global_clip": {"name": "global_clip", "max_norm": 0.1},
    "task_clip": {"name": "task_clip", "max_norm": 0.1},
    "tbgc": {"name": "tbgc", "max_norm": 0.1},
    "tbgc_max": {"name": "tbgc", "target": "max", "rescale": "always"},
    "tbgc_mean": {"name": "tbgc", "target": "mean", "rescale": "always"},
    "static": {"name": "static"},  # its weights are measured, see `Records.static_weights`
}
"""The `balancer:` block of every multi-task method; max_norm is the paper's."""
RATES = {"cpu": (5e-4, 1.5e-3, 4.5e-3), "gpu": (1e-4, 3e-4, 1e-3)}
"""Size -> AdamW's learning rates, the same for all methods, since AdamW is invariant to the scale of a gradient."""
SGD_RATES = {True: (0.03, 0.1, 0.3, 1.0, 3.0), False: (0.003, 0.01, 0.03, 0.1, 0.3)}
"""SGD's learning rates: for gradients clipped to a norm of 0.1 (True), and for raw ones (False)."""
SINGLE = {f"single_{task}": task for task in TASKS}
CLIPPED = ("global_clip", "task_clip", "tbgc")
BLOCKS: dict[tuple[str, str], list[str]] = {
    ("composed", "adamw"): [*SINGLE, *METHODS],
    ("composed", "sgd"): [*SINGLE, "sum", "global_clip", "task_clip", "tbgc", "static"],
    ("native", "adamw"): ["single_detection", "sum", "tbgc"],
}
"""(Data, optimizer) -> the methods that are compared, in the order in which they run."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.0},
}
"""Optimizer -> what it changes in the `trainer:` block."""
CHOICE_SEED = 100  # for the learning rate; none of the seeds that are tested
SEEDS = range(5)


@dataclass(frozen=True)
class Spec:
    """One run: data, optimizer, method, learning rate, seed, and the split on which it is scored."""

    data: str
    optimizer: str
    method: str
    lr: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.data}-{self.optimizer}-{self.method}-lr{self.lr:g}-seed{self.seed}-{self.split}"

    @property
    def tasks(self) -> list[str]:
        """The tasks that the run trains."""
        return [SINGLE[self.method]] if self.method in SINGLE else list(TASKS)
