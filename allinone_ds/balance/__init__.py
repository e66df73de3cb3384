"""The idea: weightings, the balancer that applies them to gradient shards, and the report of each step."""

from .adaptive import DBMTL, DWA, GradNorm, RandomWeights, Uncertainty
from .balancer import TaskBalancer
from .errors import BalancerError, NonFinite
from .named import balancer_from_config, weighting_from_config
from .report import StepReport
from .weighting import TBGC, GlobalClip, GramWeighting, Static, StepRecord, Sum, TaskClip, Weighting

__all__ = [
    "DBMTL",
    "DWA",
    "TBGC",
    "BalancerError",
    "GlobalClip",
    "GradNorm",
    "GramWeighting",
    "NonFinite",
    "RandomWeights",
    "Static",
    "StepRecord",
    "StepReport",
    "Sum",
    "TaskBalancer",
    "TaskClip",
    "Uncertainty",
    "Weighting",
    "balancer_from_config",
    "weighting_from_config",
]
