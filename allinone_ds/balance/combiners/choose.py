"""The choice of the combiner that serves a balancer's options."""

from __future__ import annotations

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.delayed import DelayedCombiner
from allinone_ds.balance.combiners.exact import exact_combiner
from allinone_ds.balance.combiners.features import FeaturesCombiner
from allinone_ds.balance.combiners.sketched import SketchCombiner
from allinone_ds.balance.combiners.task_parallel import GroupedCombiner
from allinone_ds.balance.weightings.base import Weighting
from allinone_ds.zero.engines.base import EngineAdapter


def choose_combiner(
    adapter: EngineAdapter,
    weighting: Weighting,
    norm: str,
    sketch_size: int | None,
    groups: TaskGroups,
    agreement: Agreement | None,
) -> Combiner:
    """Return the combiner that computes norms as `norm` says.

    Args:
        adapter: of the engine.
        weighting: turns the record of the step into factors.
        norm: "exact", "sketch", "delayed" or "features".
        sketch_size: length k of a sketch; None chooses by the number of parameters.
        groups: which ranks run which task.
        agreement: between ranks that run different tasks; None: every rank runs every task.
    """
    if agreement is not None:
        return GroupedCombiner(adapter, weighting, norm, sketch_size, groups, agreement)
    if norm == "sketch":
        return SketchCombiner(adapter, weighting, sketch_size, groups.tasks)
    if norm == "delayed":
        return DelayedCombiner(adapter, weighting, sketch_size, groups.tasks)
    if norm == "features":
        return FeaturesCombiner(adapter, weighting, groups.tasks)
    return exact_combiner(adapter, weighting, groups.tasks)
