"""Train one large vision backbone on many tasks with DeepSpeed ZeRO, every task's gradient balanced exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allinone_ds._lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .balance.assignment import plan_groups
    from .balance.balancer import TaskBalancer
    from .balance.joint.block import task_features
    from .balance.joint.feature_balance import FeatureBalance
    from .balance.options import weighting_from_config
    from .balance.report import StepReport
    from .balance.weightings.adaptive import DBMTL, DWA, FAMO, GradNorm, RandomWeights, Uncertainty
    from .balance.weightings.base import StepRecord, Weighting
    from .balance.weightings.clipping import TBGC, GlobalClip, Static, Sum, TaskClip
    from .balance.weightings.gram import GramWeighting
    from .errors import BalancerError
    from .export.loading import load
    from .model import AllInOneModel
    from .run_config.arguments import AllInOneArguments
    from .training.run import finish_run
    from .training.trainer import AllInOneTrainer

__all__ = [
    "AllInOneArguments",
    "AllInOneModel",
    "AllInOneTrainer",
    "BalancerError",
    "DBMTL",
    "DWA",
    "FAMO",
    "FeatureBalance",
    "GlobalClip",
    "GradNorm",
    "GramWeighting",
    "RandomWeights",
    "Static",
    "StepRecord",
    "StepReport",
    "Sum",
    "TBGC",
    "TaskBalancer",
    "TaskClip",
    "Uncertainty",
    "Weighting",
    "finish_run",
    "load",
    "plan_groups",
    "task_features",
    "weighting_from_config",
]

__getattr__, _ = lazy_names(
    __name__,
    {
        "balance.assignment": ["plan_groups"],
        "balance.balancer": ["TaskBalancer"],
        "balance.joint.block": ["task_features"],
        "balance.joint.feature_balance": ["FeatureBalance"],
        "balance.options": ["weighting_from_config"],
        "balance.report": ["StepReport"],
        "balance.weightings.adaptive": ["DBMTL", "DWA", "FAMO", "GradNorm", "RandomWeights", "Uncertainty"],
        "balance.weightings.base": ["StepRecord", "Weighting"],
        "balance.weightings.clipping": ["TBGC", "GlobalClip", "Static", "Sum", "TaskClip"],
        "balance.weightings.gram": ["GramWeighting"],
        "errors": ["BalancerError"],
        "export.loading": ["load"],
        "model": ["AllInOneModel"],
        "run_config.arguments": ["AllInOneArguments"],
        "training.run": ["finish_run"],
        "training.trainer": ["AllInOneTrainer"],
    },
)
