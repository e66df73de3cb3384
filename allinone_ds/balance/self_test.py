"""The start-up test of a DeepSpeed release: balanced steps of a toy model against the same steps in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from allinone_ds.balance.arithmetic import float32_products
from allinone_ds.balance.joint.block import task_features
from allinone_ds.balance.weightings.clipping import TBGC
from allinone_ds.distributed import world_size
from allinone_ds.errors import BalancerError
from allinone_ds.testing import toy
from allinone_ds.testing.exactness import compare, train
from allinone_ds.testing.reference import reference_run
from allinone_ds.zero.engine_like import engine_like, whole_weights
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.support import CHECKED_RELEASES, checked_release, release_name

_WEIGHTING = {"name": "tbgc", "max_norm": 0.1}
_LR = 0.5  # weights move far, so that 16-bit rounding stays small beside the moves


def self_test(
    engine: Any,
    balancer_class: Callable[..., Any],
    norm: str = "exact",
    parallel: str = "data",
    micro_steps: int = 2,
    steps: int = 3,
) -> float:
    """Train a toy model on an engine of the same kind and compare its weights with a float64 reference. Collective.

    Args:
        engine: gives ZeRO stage, precision and offload settings; it is not touched.
        balancer_class: `TaskBalancer`, whose module imports this one.
        norm, parallel: of the balancer.
        micro_steps: micro-steps per task.
        steps: balanced steps; the later ones show what earlier ones leave behind.

    Returns:
        The largest difference of a weight, relative to the largest change of a weight.

    Raises:
        BalancerError: the difference is above 1e-4 (fp32) or 0.1 (16-bit weights or autocast).
    """
    at = "features" if norm == "features" else "backbone"
    head_lr = toy.RAW_RATE if at == "features" else None  # heads keep their raw gradient
    model, before, reference = (toy.make_model(width=4, depth=1) for _ in range(3))  # small: a sketch of it is exact
    test_engine = engine_like(engine, model.float(), toy.param_groups(model, head_lr=head_lr), _LR)
    dtype = next(test_engine.module.parameters()).dtype
    balancer = balancer_class(
        test_engine, toy.TASKS, "backbone", TBGC(max_norm=0.1), norm=norm, parallel=parallel, self_test=False
    )
    test_engine.module.mark = task_features
    counts = dict.fromkeys(toy.TASKS, micro_steps)
    with float32_products():  # the limit is that of float32
        reports = train(test_engine, balancer, counts, steps)
    options: dict[str, Any] = {"lr": _LR, "head_lr": head_lr, "delayed": norm == "delayed", "at": at}
    wanted = reference_run(_WEIGHTING, steps, counts, world_size(), model=reference, **options)
    found = compare(whole_weights(test_engine), reports, wanted, before)
    balancer.detach()
    rounds = dtype != torch.float32 or test_engine.torch_autocast_enabled()
    worst, limit = found["weights_relative"], 0.1 if rounds else 1e-4
    if not worst <= limit:
        advice = f"use a checked release of DeepSpeed ({', '.join(CHECKED_RELEASES)})"
        if checked_release():
            advice = "try zero_optimization.overlap_comm: false, or another ZeRO stage"
        raise BalancerError(
            f"self-test with DeepSpeed {release_name()}, ZeRO stage {int(engine.zero_optimization_stage())}, "
            f"norm={norm!r}, parallel={parallel!r}: balanced steps differ from their reference by {worst:.1e} of the "
            f"largest update (allowed: {limit:.0e}); {advice}; self_test=False trains in spite of it"
        )
    return worst


def unchecked(adapter: EngineAdapter) -> bool:
    """Return whether the package was never seen to be exact where it runs: another release, or several accelerators."""
    return not checked_release() or (world_size() > 1 and adapter.compute_device.type != "cpu")


def warn_of_unchecked_release() -> None:
    """Warn that the installed release of DeepSpeed was not checked, and that the self-test runs because of it."""
    if not checked_release():
        warnings.warn(
            f"DeepSpeed {release_name()} was not checked with this release of allinone_ds "
            f"(checked: {', '.join(CHECKED_RELEASES)}); running a self-test of balanced steps",
            stacklevel=4,
        )
