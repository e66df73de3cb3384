"""The idea: weightings, the balancer that applies them to gradient shards, and the report of each step."""

from .adaptive import DBMTL, DWA, FAMO, GradNorm, RandomWeights, Uncertainty
from .balancer import TaskBalancer
from .errors import BalancerError, NonFinite
from .groups import TaskGroups, groups_for, task_groups
from .named import balancer_from_config, weighting_from_config
from .planner import GroupPlan, plan_groups
from .report import StepReport
from .weighting import TBGC, GlobalClip, GramWeighting, Static, StepRecord, Sum, TaskClip, Weighting

__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "TBGC",
    "BalancerError",
    "GlobalClip",
    "GradNorm",
    "GramWeighting",
    "GroupPlan",
    "NonFinite",
    "RandomWeights",
    "Static",
    "StepRecord",
    "StepReport",
    "Sum",
    "TaskBalancer",
    "TaskClip",
    "TaskGroups",
    "Uncertainty",
    "Weighting",
    "balancer_from_config",
    "groups_for",
    "plan_groups",
    "task_groups",
    "weighting_from_config",
]
