"""Checks of misuse of joint blocks and of what is left after an error; started by ranks_joint.py."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds import TBGC, TaskBalancer
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish, raises
from tests.balance.joint_model import TASKS, batch, make_engine


def check_misuse_of_joint_blocks() -> None:
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))
    x, chosen = batch(0, 0, dist.get_rank(), "all")

    def block(names, change=lambda losses: losses, **options):
        def run() -> None:
            with balancer.joint(names, **options):
                balancer.backward(change(engine(x.float(), chosen, False)))

        return run

    all_tasks = tuple(TASKS)

    def another_forward(losses):
        return {**losses, "b": engine(x.float(), chosen, False)["b"]}

    def detached(losses):
        return {**losses, "b": engine.module.each("b", torch.ones(4, 7)).mean()}

    for change in (another_forward, detached):
        raises(BalancerError, "task 'b' does not meet those of the other tasks", block(all_tasks, change))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block(all_tasks, lambda losses: dict(zip(losses, torch.stack(tuple(losses.values())).unbind(), strict=True)))()
    assert any("'a' and 'b' are outputs of one operation" in str(one.message) for one in caught), caught
    assert balancer.step().applied
    raises(BalancerError, "unknown task 'x'", block(("a", "x")))
    raises(ConfigError, "did you mean 'features'", block(all_tasks, at="feature"))
    raises(BalancerError, "pass a dict", block(all_tasks, lambda losses: losses["a"]))
    raises(BalancerError, "no loss of task 'b'", block(all_tasks, lambda losses: {"a": losses["a"]}))
    raises(BalancerError, "a loss of 'z'", block(all_tasks, lambda losses: {**losses, "z": None}))
    raises(BalancerError, "without a graph", block(all_tasks, lambda losses: {**losses, "a": torch.ones(())}))
    raises(BalancerError, "after 1 of 2 micro-steps", block(all_tasks, micro_steps=2))
    raises(BalancerError, "no features are marked", _with_marks(engine, block(all_tasks, at="features"), None))
    swapped = {"a": "b", "b": "a", "c": "c"}
    raises(BalancerError, "marked for task 'b'", _with_marks(engine, block(all_tasks, at="features"), swapped))
    twice = {"a": "a", "b": "a", "c": "c"}
    raises(BalancerError, "a second time", _with_marks(engine, block(all_tasks, at="features"), twice))
    other = {"a": "a", "b": "b", "c": "x"}
    raises(BalancerError, "unknown task 'x'", _with_marks(engine, block(all_tasks, at="features"), other))

    raises(BalancerError, "does not reach the features", block(all_tasks, detached, at="features"))
    with_counts = (
        ("pass a dict", 3),
        ("unknown task 'z'", {"a": 1, "b": 1, "c": 1, "z": 1}),
        ("no count of task 'b'", {"a": 1, "c": 1}),
        ("count of task 'b' = -1", {"a": 1, "b": -1, "c": 1}),
        ("count of task 'b' = nan", {"a": 1, "b": float("nan"), "c": 1}),
        ("count of task 'b' = 'x'", {"a": 1, "b": "x", "c": 1}),
        ("an integer of 0 or more", {"a": 1, "b": 1.5, "c": 1}),
    )
    for text, count in with_counts:
        for at in ("backbone", "features"):
            raises(BalancerError, text, _counted(balancer, lambda: engine(x.float(), chosen, False), count, at))
    missing = {"a": 1, "b": 2, "c": 1}

    def without_b():
        return {**engine(x.float(), chosen, False), "b": None}

    raises(BalancerError, "count of task 'b' = 2, and its loss is None", _counted(balancer, without_b, missing))
    raises(BalancerError, "an integer of 0 or more", _count_of_a_task(balancer, engine, x, chosen, {"a": 1}))
    raises(BalancerError, "an integer of 0 or more", _count_of_a_task(balancer, engine, x, chosen, 2.5))
    if dist.get_world_size() > 1:
        mine = ("a", "b") if dist.get_rank() else ("b", "a")
        raises(BalancerError, "ranks disagree", block(mine, lambda losses: {t: losses[t] for t in mine}))
        raises(BalancerError, "ranks disagree", block(all_tasks, micro_steps=1 + dist.get_rank()))
        fails = block(all_tasks, (lambda losses: losses["a"]) if dist.get_rank() else (lambda losses: losses))
        raises(BalancerError, "pass a dict" if dist.get_rank() else "rank 1: left task", fails)
    block(all_tasks, lambda losses: dict(reversed(losses.items())))()
    raises(BalancerError, "second time", block(("a",)))
    assert balancer.step().applied, "usable after every error"
    finish(balancer)
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(), norm="sketch")
    raises(ConfigError, "norm='exact'", block(all_tasks))
    finish(balancer)


def _with_marks(engine, call, names: dict[str, str] | None):
    """Return the call with features marked for the tasks `names`; None: not marked."""

    def run() -> None:
        engine.module.marks = names is not None
        engine.module.mark_names = names or {}
        try:
            call()
        finally:
            engine.module.marks, engine.module.mark_names = True, {}

    return run


def _counted(balancer, losses, count, at: str = "backbone"):
    def run() -> None:
        with balancer.joint(TASKS, at=at):
            balancer.backward(losses(), count=count)

    return run


def _count_of_a_task(balancer, engine, x, chosen, count):
    def run() -> None:
        with balancer.task("a"):
            balancer.backward(engine(x.float(), {"a": chosen["a"]}, False)["a"], count=count)

    return run


def check_an_error_in_a_joint_block_leaves_nothing_of_it() -> None:
    """Also in a block of one task, whose first micro-step has been summed already, or whose gradient was taken."""
    for at in ("backbone", "features"):
        for names in (("a",), ("a", "b", "c")):
            for micro_steps in (1, 2):
                expected, found = (_step_with_joint_block(at, names, micro_steps, fails) for fails in (False, True))
                off = max(float((expected[n] - value).abs().max()) for n, value in found.items())
                assert off < 1e-7, (at, names, micro_steps, off)


def _step_with_joint_block(at: str, names: tuple[str, ...], micro_steps: int, fails: bool) -> dict[str, Tensor]:
    """Return the weights after a step, whose block first ends after its first backward if it `fails`."""
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))

    def run(broken: bool) -> None:
        with balancer.joint(names, micro_steps, at=at):
            for k in range(micro_steps):
                x, chosen = batch(0, k, dist.get_rank(), "all")
                balancer.backward(engine(x.float(), {t: chosen[t] for t in names}, False))
                if broken:
                    raise ZeroDivisionError("planned")

    if fails:
        raises(ZeroDivisionError, "planned", lambda: run(True))
    run(False)
    assert balancer.step(require_all=False).applied
    weights = {n: whole_master(engine, p) for n, p in engine.module.named_parameters()}
    finish(balancer)
    return weights
