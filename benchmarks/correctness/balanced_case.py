"""One case of the exactness table, run with this package's balancer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allinone_ds import TaskBalancer, task_features, weighting_from_config
from allinone_ds.testing import exactness, toy
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master


def make_balancer(engine: Any, weighting: Mapping[str, Any], **options: str) -> TaskBalancer:
    """Return a balancer on an engine that holds the toy model, and mark what its heads read."""
    engine.module.mark = task_features
    return TaskBalancer(engine, toy.TASKS, "backbone", weighting_from_config(weighting), **options)


def run_case(case: Case, weighting: Mapping[str, Any], micro_steps: Sequence[int]) -> dict[str, Any]:
    """Return the differences from the float64 reference, see `allinone_ds.testing.exactness`. Call on every rank."""
    return exactness.run_case(case, weighting, micro_steps, make_balancer, whole_master)
