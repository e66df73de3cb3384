"""The idea of the package: `TaskBalancer`, the weightings, and the report of each step.

It knows tensors, not DeepSpeed, and may import `zero`, `testing` and the modules at the bottom of the package.
"""

from allinone_ds._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "assignment": ["GroupPlan", "TaskGroups", "groups_for", "plan_groups", "task_groups"],
        "balancer": ["TaskBalancer"],
        "options": ["BalancerConfig", "weighting_from_config"],
        "report": ["StepReport"],
        "weightings.adaptive": ["DBMTL", "DWA", "FAMO", "GradNorm", "RandomWeights", "Uncertainty"],
        "weightings.base": ["StepRecord", "Weighting"],
        "weightings.clipping": ["GlobalClip", "Static", "Sum", "TBGC", "TaskClip"],
        "weightings.gram": ["GramWeighting"],
        "..errors": ["BalancerError", "NonFinite"],
    },
)
