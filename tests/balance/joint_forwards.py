"""Checks of unusual forwards in joint blocks: orders that differ between ranks, checkpointing, evaluation, steps
without labels; started by ranks_joint.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds import TBGC, GramWeighting, TaskBalancer
from allinone_ds.errors import BalancerError
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish, raises
from tests.balance.joint_model import TASKS, batch, inverse, make_engine

PLACES = (("backbone", "exact"), ("features", "exact"), ("features", "features"))


def start(stage: int, norm: str = "exact", weighting: Any = None) -> tuple[Any, TaskBalancer]:
    engine = make_engine(Case(f"zero{stage}", stage))
    return engine, TaskBalancer(engine, tuple(TASKS), "backbone", weighting or TBGC(max_norm=0.05), norm=norm)


def run_block(engine: Any, balancer: TaskBalancer, at: str, step: int = 0, order: Sequence[str] = tuple(TASKS)) -> None:
    with balancer.joint(TASKS, at=at):
        x, chosen = batch(step, 0, dist.get_rank(), "all")
        balancer.backward(engine(x.float(), {task: chosen[task] for task in order}, False))


def end(engine: Any, balancer: TaskBalancer) -> dict[str, Tensor]:
    """Return the weights, after the engine was removed."""
    weights = {name: whole_master(engine, p).clone() for name, p in engine.module.named_parameters()}
    finish(balancer)
    return weights


def two_steps(stage: int, at: str, norm: str = "exact", order: Sequence[str] = tuple(TASKS), **traits: Any) -> Any:
    """Return the weights after two steps of a model with some attributes set."""
    engine, balancer = start(stage, norm)
    for name, value in traits.items():
        setattr(engine.module, name, value)
    for step in range(2):
        run_block(engine, balancer, at, step, order)
        assert balancer.step().applied
    return end(engine, balancer)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - value).abs().max()) for name, value in second.items())


def check_ranks_run_the_heads_in_different_orders() -> None:
    """ZeRO-2 reduces in the order of the backward; ranks would add gradients of different heads."""
    mine = ("c", "a", "b") if dist.get_rank() else tuple(TASKS)
    for stage in range(3):  # under ZeRO-3 the forwards wait for each other
        for at, norm in PLACES:
            if stage == 2 and norm == "features":
                raises(BalancerError, "in different orders", lambda: two_steps(2, "features", "features", mine))
                continue
            off = largest_difference(two_steps(stage, at, norm), two_steps(stage, at, norm, mine))
            assert off < 1e-7, (stage, at, norm, off)


def check_layers_of_a_task_run_in_different_orders() -> None:
    """In a block of one task: an error of every rank, in place of gradients of different parameters added up."""
    if dist.get_world_size() == 1:
        return
    engine, balancer = start(2)
    x = torch.ones(2, 5)

    def run() -> None:
        with balancer.task("a"):
            engine(x, {}, False)
            features = engine.module.backbone(x)
            names = ("b", "c") if dist.get_rank() else ("c", "b")  # the head of the task is made of two
            parts = [engine.module.heads[name](features).mean() for name in names]
            balancer.backward(torch.stack(parts).sum())

    raises(BalancerError, "layers and heads in the same order", run)
    run_block(engine, balancer, "backbone")
    assert balancer.step().applied
    end(engine, balancer)


def check_activation_checkpointing() -> None:
    for stage in (0, 2, 3):
        for at in ("backbone", "features"):
            expected = two_steps(stage, at)
            for part in ("backbone", "model"):
                for reentrant in (False, True):
                    traits = {"checkpointed": part, "reentrant": reentrant}
                    if (at, part, reentrant) == ("features", "model", True):
                        raises(BalancerError, "use_reentrant=False", lambda: two_steps(stage, at, **traits))  # noqa: B023
                        continue
                    off = largest_difference(expected, two_steps(stage, at, **traits))
                    assert off < 1e-7, (stage, at, part, reentrant, off)


def check_evaluation_inside_a_block() -> None:
    for at in ("backbone", "features"):
        engine, balancer = start(2)
        with balancer.joint(TASKS, at=at):
            x, chosen = batch(0, 0, dist.get_rank(), "all")
            with torch.no_grad():
                engine(x.float(), chosen, False)
            losses = engine(x.float(), chosen, False)
            with torch.no_grad():
                engine(x.float(), chosen, False)
            balancer.backward(losses)
        assert balancer.step().applied
        expected, other = start(2)
        run_block(expected, other, at)
        other.step()
        assert largest_difference(end(expected, other), end(engine, balancer)) < 1e-7, at
    engine, balancer = start(2)

    def with_a_graph() -> None:
        engine(x.float(), chosen, False)
        balancer.backward(engine(x.float(), chosen, False))

    def run() -> None:
        with balancer.joint(TASKS, at="features"):
            with_a_graph()

    raises(BalancerError, "under torch.no_grad()", run)
    finish(balancer)


def check_a_step_without_any_label_changes_nothing() -> None:
    """Also the step after it is as without it; with losses of None, and with counts of 0."""
    for stage in range(4):
        for at, norm in PLACES:
            for weighting in (None, GramWeighting(inverse)) if norm == "exact" else (None,):
                engine, balancer = start(stage, norm, weighting)
                run_block(engine, balancer, at)
                balancer.step()
                expected = end(engine, balancer)
                engine, balancer = start(stage, norm, weighting)
                for none in (True, False):
                    if none and (norm == "features" or stage == 3):
                        continue  # every rank runs every head
                    before = {n: whole_master(engine, p).clone() for n, p in engine.module.named_parameters()}
                    with balancer.joint(TASKS, at=at):
                        x, chosen = batch(7, 0, dist.get_rank(), "all")
                        losses = engine(x.float(), chosen, False)
                        count = None if none else dict.fromkeys(TASKS, 0)
                        balancer.backward(dict.fromkeys(TASKS) if none else losses, count)
                    report = balancer.step()
                    assert not report.applied and not report.tasks and not report.skipped, (stage, at, norm, none)
                    after = {n: whole_master(engine, p) for n, p in engine.module.named_parameters()}
                    assert largest_difference(before, after) == 0, (stage, at, norm, none)
                run_block(engine, balancer, at)
                assert balancer.step().applied
                off = largest_difference(expected, end(engine, balancer))
                assert off < 1e-7, (stage, at, norm, weighting, off)
