"""The idea: weightings, the balancer that applies them to gradient shards, and the report of each step."""

from .balancer import TaskBalancer
from .errors import BalancerError, NonFinite
from .report import StepReport
from .weighting import TBGC, GlobalClip, GramWeighting, StepRecord, Sum, TaskClip, Weighting, weighting_from_config

__all__ = [
    "TBGC",
    "BalancerError",
    "GlobalClip",
    "GramWeighting",
    "NonFinite",
    "StepRecord",
    "StepReport",
    "Sum",
    "TaskBalancer",
    "TaskClip",
    "Weighting",
    "weighting_from_config",
]
