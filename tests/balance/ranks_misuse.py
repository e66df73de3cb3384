"""Checks of misuse, refused engines and the start-up self-test (see `ranks_balancer.py`)."""

from __future__ import annotations

import warnings

import deepspeed
import torch
import torch.distributed as dist

from allinone_ds import Sum, TaskBalancer
from allinone_ds.balance.self_test import self_test
from allinone_ds.errors import BalancerError, UnsupportedEngine
from allinone_ds.testing.reference import reference_run
from allinone_ds.zero import support
from allinone_ds.zero.engines.stage3 import Stage3Adapter
from tests.balance.engines import (
    CASES,
    FP32_KINDS,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    raises,
    run_task,
    toy,
    weights,
)

# misuse


def check_misuse_is_an_error_and_changes_nothing() -> None:
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload"):
        _misuse(case)


def _misuse(case: str) -> None:
    engine = make_engine(case)
    balancer = make_balancer(engine)
    x = inputs(engine, "det", 0, 0)
    before = weights(engine)

    def enter(name, micro_steps=1, calls=1, loss=None):
        with balancer.task(name, micro_steps):
            for _ in range(calls):
                balancer.backward(engine("det", x) if loss is None else loss)

    def nested():
        with balancer.task("det"), balancer.task("seg"):
            pass

    raises(BalancerError, "did you mean 'det'", lambda: enter("dett"))
    raises(BalancerError, "before task(s) det, seg, cls", balancer.step)
    raises(BalancerError, "outside a task", lambda: balancer.backward(engine("det", x)))
    raises(BalancerError, "after 1 of 2 micro-steps", lambda: enter("det", 2, 1))
    raises(BalancerError, "more than its 1 micro-steps", lambda: enter("det", 1, 2))
    raises(BalancerError, "micro_steps = 0", lambda: enter("det", 0))
    raises(BalancerError, "shape (2,)", lambda: enter("det", loss=torch.ones(2, requires_grad=True)))
    raises(BalancerError, "without a graph", lambda: enter("det", loss=torch.ones(())))
    raises(BalancerError, "float", lambda: enter("det", loss=1.0))
    raises(BalancerError, "engine.step() was called", engine.step)
    raises(BalancerError, "engine.backward() was called", lambda: engine.backward(engine("det", x)))
    raises(BalancerError, "begins inside task 'det'", nested)
    run_task(balancer, "det")
    raises(BalancerError, "a second time", lambda: enter("det"))
    raises(BalancerError, "before task(s) seg, cls ran (ran: det)", balancer.step)
    assert largest_change(before, weights(engine)) == 0.0
    for task in ("seg", "cls"):
        run_task(balancer, task)
    balancer.step()
    expect_one_step(engine, case)
    raises(BalancerError, "already has a TaskBalancer", lambda: make_balancer(engine))
    balancer.detach()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine("det", x))
    engine.step()
    engine.destroy()


def expect_one_step(engine, case: str) -> None:
    """The weights are those of one undisturbed TBGC step."""
    wanted = reference_run({"name": "tbgc"}, 1, dict.fromkeys(toy.TASKS, 1), dist.get_world_size())
    got = weights(engine)
    for name, value in wanted.params.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=f"{case} {name}")


def check_an_exception_inside_a_task_leaves_the_step_usable() -> None:
    for case in FP32_KINDS:
        engine = make_engine(case)
        balancer = make_balancer(engine)
        run_task(balancer, "det")

        def broken(balancer=balancer, engine=engine):
            with balancer.task("seg", 2):
                balancer.backward(engine("seg", inputs(engine, "seg", 9, 9), True))
                raise KeyError("a loader's error")

        raises(KeyError, "a loader's error", broken)
        for task in ("seg", "cls"):
            run_task(balancer, task)
        balancer.step()
        expect_one_step(engine, case)
        finish(balancer)


def check_ranks_in_different_tasks_are_named() -> None:
    if dist.get_world_size() == 1:
        return
    balancer = make_balancer(make_engine("zero2 fp32"))
    mine = "det" if dist.get_rank() == 0 else "seg"
    raises(BalancerError, "rank 0: task 'det', 1 micro-steps; rank 1: task 'seg'", lambda: run_task(balancer, mine))
    steps = 1 + dist.get_rank()
    raises(BalancerError, "rank 1: task 'det', 2 micro-steps", lambda: run_task(balancer, "det", micro_steps=steps))
    for task in toy.TASKS:
        run_task(balancer, task)
    balancer.step()
    finish(balancer)


def check_engines_that_cannot_be_balanced_are_refused() -> None:
    clip_default = {k: v for k, v in CASES["zero2 fp32"].config().items() if k != "gradient_clipping"}
    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=clip_default)[0]
    raises(UnsupportedEngine, "gradient_clipping is 1.0", lambda: make_balancer(engine))
    TaskBalancer(engine, toy.TASKS, "backbone", Sum(), allow_gradient_clipping=True).detach()
    for wrong, text in (([], "has no parameter"), ([torch.ones(1)], "nn.Parameter"),
                        (list(toy.make_model().parameters()), "do not belong to the engine's module")):  # fmt: skip
        raises((ValueError, TypeError), text, lambda wrong=wrong: TaskBalancer(
            engine, toy.TASKS, wrong, Sum(), allow_gradient_clipping=True))  # fmt: skip
    raises(ValueError, "each once", lambda: TaskBalancer(engine, ("det", "det"), "backbone", Sum(),
                                                         allow_gradient_clipping=True))  # fmt: skip
    raises(ValueError, "did you mean 'backbone'", lambda: TaskBalancer(engine, toy.TASKS, "backbon", Sum(),
                                                                       allow_gradient_clipping=True))  # fmt: skip
    engine.destroy()
    raises(TypeError, "pass the engine", lambda: make_balancer(model))


# start-up self-test


def check_self_test_passes_on_every_kind() -> None:
    for case in (*FP32_KINDS, "zero0 bf16", "zero1 bf16 fp32-accumulation", "zero2 bf16", "zero2 fp16", "zero3 fp16"):
        engine = make_engine(case)
        worst = self_test(engine, TaskBalancer)
        assert worst < (1e-5 if "fp32" in case and "bf16" not in case else 0.05), (case, worst)
        engine.destroy()


def check_self_test_finds_a_broken_adapter() -> None:
    """A release whose gradients survive `clear_gradient` would apply a task's gradient again."""
    engine = make_engine("zero3 fp32")
    clear = Stage3Adapter.clear_gradient
    Stage3Adapter.clear_gradient = lambda self: None
    try:
        raises(BalancerError, "self-test", lambda: self_test(engine, TaskBalancer))
    finally:
        Stage3Adapter.clear_gradient = clear
    engine.destroy()


def check_unchecked_release_warns_and_tests_itself() -> None:
    engine = make_engine("zero2 fp32")
    checked, support.CHECKED_RELEASES = support.CHECKED_RELEASES, ()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            balancer = make_balancer(engine, self_test=None)
    finally:
        support.CHECKED_RELEASES = checked
    assert any("self-test" in str(w.message) for w in caught)
    finish(balancer)
