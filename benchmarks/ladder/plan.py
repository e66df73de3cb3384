"""The runs of the ladder: methods, learning rates, seeds and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASKS = {"detection": "map50", "segmentation": "miou", "classification": "top1"}
"""Task -> the metric by which it is scored."""
JOINT_TASKS = {
    "detection": "map50", "segmentation": "miou", "depth": "delta1", "edges": "ods", "saliency": "max_f",
    "keypoints": "map50", "attributes": "map", "count": "r2",
}  # fmt: skip
"""The same for the scenes that have all labels."""
ABSOLUTE = ("count",)
"""Tasks whose change is the difference of scores: an R2 of 0 is that of the mean label, so a ratio says nothing."""
TASKS_OF = {"composed": TASKS, "native": TASKS, "joint": JOINT_TASKS}
"""Data -> its tasks."""
METHODS: dict[str, dict[str, Any]] = {
    "sum": {"name": "sum"},
    "global_clip": {"name": "global_clip", "max_norm": 0.1},
    "task_clip": {"name": "task_clip", "max_norm": 0.1},
    "tbgc": {"name": "tbgc", "max_norm": 0.1},
    "tbgc_max": {"name": "tbgc", "target": "max", "rescale": "always"},
    "tbgc_mean": {"name": "tbgc", "target": "mean", "rescale": "always"},
    "static": {"name": "static"},  # its weights are measured, see `Records.static_weights`
    "tbgc_both": {"name": "tbgc", "max_norm": 0.1, "rescale": "always"},
    "equal_updates": {"name": "equal_updates", "total": 0.1},
    "tbgc_no_heads": {"name": "tbgc", "max_norm": 0.1, "heads": "none"},
    "tbgc_own_heads": {"name": "tbgc_own_heads", "max_norm": 0.1},
    "tbgc_features": {"name": "tbgc", "max_norm": 0.0005},  # at the features, where norms are smaller
    "db_mtl": {"name": "db_mtl"},
    "imtl_g": {"name": "imtl_g"},
    "fairgrad": {"name": "fairgrad", "alpha": 1.0},
    "famo": {"name": "famo"},
}
"""The `balancer:` block of every multi-task method; max_norm is the paper's. The methods that the package does not have
are in `benchmarks.ladder.train`."""
AT_BACKBONE = ("tbgc", "static", "db_mtl", "imtl_g", "fairgrad")
"""Methods that run at="backbone" where tasks share their images; the factors of the others do not depend on it."""
RATES = {"cpu": (5e-4, 1.5e-3, 4.5e-3), "gpu": (1e-4, 3e-4, 1e-3)}
"""Size -> AdamW's learning rates, the same for all methods, since AdamW and Muon are invariant to the
scale of a gradient."""
SGD_RATES = {True: (0.03, 0.1, 0.3, 1.0, 3.0), False: (0.003, 0.01, 0.03, 0.1, 0.3)}
"""SGD's learning rates: for gradients clipped to a norm of 0.1 (True), and for raw ones (False)."""
SINGLE = {f"single_{task}": task for task in (*TASKS, *(task for task in JOINT_TASKS if task not in TASKS))}


def _singles(data: str) -> list[str]:
    return [f"single_{task}" for task in TASKS_OF[data]]


CLIPPED = ("global_clip", "task_clip", "tbgc", "tbgc_no_heads", "tbgc_own_heads")
LADDER = ("sum", "global_clip", "task_clip", "tbgc")
BLOCKS: dict[tuple[str, str], list[str]] = {
    ("composed", "adamw"): [
        *_singles("composed"), *LADDER, "tbgc_max", "tbgc_mean", "tbgc_both", "equal_updates", "static",
    ],
    ("composed", "sgd"): [*_singles("composed"), *LADDER, "tbgc_no_heads", "tbgc_own_heads", "static"],
    ("composed", "muon"): [*_singles("composed"), *LADDER, "static"],
    ("native", "adamw"): ["single_detection", "sum", "tbgc"],
    ("joint", "adamw"): [
        *_singles("joint"), "sum", "tbgc", "tbgc_features", "static", "db_mtl", "imtl_g", "fairgrad", "famo",
    ],
}  # fmt: skip
"""(Data, optimizer) -> the methods that are compared, in the order in which they run."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.0},
    "muon": {"optim": "muon"},
}
"""Optimizer -> what it changes in the `trainer:` block."""
MUON_FACTOR = 5
"""Muon's learning rate divided by that of AdamW, which trains all but the matrices of the backbone beside it."""
CHOICE_SEED = 100  # for the learning rate; none of the seeds that are tested
SEEDS = {"composed": range(5), "native": range(5), "joint": range(3)}
"""Data -> the seeds that are scored on the test split."""


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
        return [SINGLE[self.method]] if self.method in SINGLE else list(TASKS_OF[self.data])
