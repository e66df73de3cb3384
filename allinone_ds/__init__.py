"""Train one large vision backbone on many tasks with DeepSpeed ZeRO, every task's gradient balanced exactly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .balance import (
        DBMTL,
        DWA,
        FAMO,
        TBGC,
        BalancerError,
        GlobalClip,
        GradNorm,
        GramWeighting,
        RandomWeights,
        Static,
        StepRecord,
        StepReport,
        Sum,
        TaskBalancer,
        TaskClip,
        Uncertainty,
        Weighting,
        plan_groups,
        weighting_from_config,
    )
    from .export import load
    from .models import AllInOneModel
    from .training import AllInOneArguments, AllInOneTrainer

_HOMES = {
    "balance": (
        "DBMTL", "DWA", "FAMO", "TBGC", "BalancerError", "GlobalClip", "GradNorm", "GramWeighting", "RandomWeights",
        "Static", "StepRecord", "StepReport", "Sum", "TaskBalancer", "TaskClip", "Uncertainty", "Weighting",
        "plan_groups", "weighting_from_config",
    ),
    "export": ("load",),
    "models": ("AllInOneModel",),
    "training": ("AllInOneArguments", "AllInOneTrainer"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "TBGC",
    "AllInOneArguments",
    "AllInOneModel",
    "AllInOneTrainer",
    "BalancerError",
    "GlobalClip",
    "GradNorm",
    "GramWeighting",
    "RandomWeights",
    "Static",
    "StepRecord",
    "StepReport",
    "Sum",
    "TaskBalancer",
    "TaskClip",
    "Uncertainty",
    "Weighting",
    "load",
    "plan_groups",
    "weighting_from_config",
]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import allinone_ds` stays quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'allinone_ds' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
