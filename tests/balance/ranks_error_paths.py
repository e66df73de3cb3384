"""Checks that every error leaves the balancer usable, and is the one that the user sees (see `ranks_balancer.py`)."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from allinone_ds import GramWeighting, TaskBalancer, Weighting
from allinone_ds.balance.combiners import base
from allinone_ds.errors import BalancerError, NonFinite
from tests.balance.engines import CASES, finish, largest_change, make_engine, run_task, toy, weights


class Bad(Exception):
    """An error of the user's code."""


def _fail(*_: Any, kind: type[BaseException] = Bad) -> Any:
    raise kind("of the user's code")


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _fail(kind=ctx.kind)


class Constant(Weighting):
    """The same factor for every task, from a weighting that can be told to raise."""

    def __init__(self, streams: bool):
        self.streams, self.bad = streams, False

    def factors(self, record):
        if self.bad:
            _fail()
        return torch.full((len(record.tasks),), 0.05)


def loss_of(balancer: TaskBalancer, k: int = 0) -> torch.Tensor:
    dtype = next(balancer.engine.module.parameters()).dtype
    return balancer.engine("seg", toy.inputs("seg", 0, k, dist.get_rank()).to(dtype), True)


# each path fails in the second task of a step, or in the step, and raises what it is listed with


def before_forward(b: TaskBalancer) -> None:
    with b.task("seg"):
        _fail()


def in_forward(b: TaskBalancer, micro_step: int = 0, kind: type[BaseException] = Bad) -> None:
    layer, handle = b.engine.module.backbone.blocks[1], None
    try:
        with b.task("seg", micro_step + 1):
            for k in range(micro_step + 1):
                if k == micro_step:
                    handle = layer.register_forward_pre_hook(partial(_fail, kind=kind))
                b.backward(loss_of(b, k))
    finally:
        handle.remove()


def after_forward(b: TaskBalancer) -> None:
    with b.task("seg"):
        loss_of(b)
        _fail()


def in_backward(b: TaskBalancer, micro_step: int = 0, kind: type[BaseException] = Bad) -> None:
    with b.task("seg", micro_step + 1):
        for k in range(micro_step):
            b.backward(loss_of(b, k))
        b.backward(_BadBackward.apply(loss_of(b, micro_step), kind))


def in_parameter_hook(b: TaskBalancer, micro_step: int = 0, swallow: bool = False) -> None:
    """In the middle of a backward: later layers have their gradients already."""
    handle = None
    try:
        with b.task("seg", micro_step + 1):
            for k in range(micro_step + 1):
                loss = loss_of(b, k)
                if k == micro_step:
                    handle = b.engine.module.backbone.blocks[1].weight.register_hook(_fail)
                try:
                    b.backward(loss)
                except Bad:
                    if not swallow:
                        raise
            if swallow:
                handle.remove()
                b.backward(loss_of(b, 1))
    finally:
        handle.remove()


def in_module_hook(b: TaskBalancer) -> None:
    handle = b.engine.module.backbone.blocks[1].register_full_backward_hook(_fail)
    try:
        with b.task("seg"):
            b.backward(loss_of(b))
    finally:
        handle.remove()


def after_backward(b: TaskBalancer) -> None:
    with b.task("seg"):
        b.backward(loss_of(b))
        _fail()


def swallowed_in_block(b: TaskBalancer) -> None:
    """A loop that skips a micro-batch whose backward failed, and counts it."""
    handle = b.engine.module.backbone.blocks[1].weight.register_hook(_fail)
    try:
        with b.task("seg"):
            try:
                b.backward(loss_of(b))
            except Bad:
                pass
    finally:
        handle.remove()


def in_the_norm(b: TaskBalancer) -> None:
    original = base.square_norm
    base.square_norm = _fail
    try:
        run_task(b, "seg")
    finally:
        base.square_norm = original


def in_the_weighting(b: TaskBalancer) -> None:
    b.weighting.bad = True
    try:
        for task in ("seg", "cls"):
            run_task(b, task)
        b.step()
    finally:
        b.weighting.bad = False


def in_the_optimizer(b: TaskBalancer) -> None:
    for task in ("seg", "cls"):
        run_task(b, task)
    optimizer = b.engine.basic_optimizer
    original = optimizer.step
    optimizer.step = _fail
    try:
        b.step()
    finally:
        optimizer.step = original


def micro_steps(b: TaskBalancer, declared: int, run: int) -> None:
    with b.task("seg", declared):
        for k in range(run):
            b.backward(loss_of(b, k))


def bad_loss(b: TaskBalancer, make: Callable[[torch.Tensor], Any]) -> None:
    with b.task("seg"):
        b.backward(make(loss_of(b)))


def stop_iteration(b: TaskBalancer) -> None:
    with b.task("seg", 2):
        batches = iter([0])
        for _ in range(2):
            b.backward(loss_of(b, next(batches)))


def closed_generator(b: TaskBalancer) -> None:
    def steps():
        with b.task("seg", 2):
            b.backward(loss_of(b))
            yield
            b.backward(loss_of(b, 1))

    running = steps()
    next(running)
    running.close()
    _fail()


def engine_call(b: TaskBalancer, name: str) -> None:
    with b.task("seg"):
        loss = loss_of(b)
        getattr(b.engine, name)(*([loss] if name == "backward" else []))


def nested(b: TaskBalancer, call: Callable[[TaskBalancer], Any]) -> None:
    with b.task("seg"):
        b.backward(loss_of(b))
        call(b)


def begin(b: TaskBalancer, name: str, count: Any = 1) -> None:
    with b.task(name, count):
        pass


def in_evaluation(b: TaskBalancer) -> None:
    with b.evaluation("seg"), torch.no_grad():
        loss_of(b)
        _fail()


PATHS: dict[str, tuple[Callable[[TaskBalancer], None], type[BaseException], str]] = {
    "before the forward": (before_forward, Bad, "of the user's code"),
    "in a forward": (in_forward, Bad, "of the user's code"),
    "in the forward of micro-step 2": (partial(in_forward, micro_step=1), Bad, "of the user's code"),
    "after the forward": (after_forward, Bad, "of the user's code"),
    "in a backward": (in_backward, Bad, "of the user's code"),
    "in the backward of micro-step 2": (partial(in_backward, micro_step=1), Bad, "of the user's code"),
    "in a parameter's hook": (in_parameter_hook, Bad, "of the user's code"),
    "in a parameter's hook of micro-step 2": (partial(in_parameter_hook, micro_step=1), Bad, "of the user's code"),
    "in a module's hook": (in_module_hook, Bad, "of the user's code"),
    "after the backward": (after_backward, Bad, "of the user's code"),
    "swallowed in the block": (swallowed_in_block, BalancerError, "failed in this block before (Bad: of the user"),
    "swallowed, and a further backward": (
        partial(in_parameter_hook, swallow=True), BalancerError, "failed in this block before (Bad: of the user"),
    "in the norm": (in_the_norm, Bad, "of the user's code"),
    "in the weighting": (in_the_weighting, Bad, "of the user's code"),
    "in the optimizer": (in_the_optimizer, Bad, "of the user's code"),
    "KeyboardInterrupt in a forward": (partial(in_forward, kind=KeyboardInterrupt), KeyboardInterrupt, ""),
    "KeyboardInterrupt in a backward": (partial(in_backward, kind=KeyboardInterrupt), KeyboardInterrupt, ""),
    "StopIteration of the data": (stop_iteration, StopIteration, ""),
    "SystemExit": (partial(in_forward, kind=SystemExit), SystemExit, ""),
    "a closed generator": (closed_generator, Bad, ""),
    "too few micro-steps": (partial(micro_steps, declared=2, run=1), BalancerError, "after 1 of 2 micro-steps"),
    "no micro-step": (partial(micro_steps, declared=1, run=0), BalancerError, "after 0 of 1 micro-steps"),
    "too many micro-steps": (partial(micro_steps, declared=1, run=2), BalancerError, "more than its 1 micro-steps"),
    "a loss of two elements": (partial(bad_loss, make=lambda x: x.repeat(2)), BalancerError, "shape (2,)"),
    "a loss without a graph": (partial(bad_loss, make=torch.Tensor.detach), BalancerError, "without a graph"),
    "a loss that is a number": (partial(bad_loss, make=float), BalancerError, "float"),
    "a loss that is None": (partial(bad_loss, make=lambda x: None), BalancerError, "NoneType"),
    "engine.backward": (partial(engine_call, name="backward"), BalancerError, "engine.backward() was called"),
    "engine.step": (partial(engine_call, name="step"), BalancerError, "engine.step() was called"),
    "step in a task": (partial(nested, call=lambda b: b.step()), BalancerError, "inside task 'seg'"),
    "abandon in a task": (partial(nested, call=lambda b: b.abandon()), BalancerError, "inside task 'seg'"),
    "a task in a task": (partial(nested, call=lambda b: begin(b, "cls")), BalancerError, "inside task 'seg'"),
    "an unknown task": (partial(begin, name="segg"), BalancerError, "did you mean 'seg'"),
    "a second time": (partial(begin, name="det"), BalancerError, "a second time"),
    "micro_steps = 0": (partial(begin, name="seg", count=0), BalancerError, "micro_steps = 0"),
    "step with tasks missing": (lambda b: b.step(), BalancerError, "before task(s) seg, cls ran (ran: det)"),
    "backward outside a task": (lambda b: b.backward(loss_of(b)), BalancerError, "outside a task"),
    "in an evaluation": (in_evaluation, Bad, "of the user's code"),
}  # fmt: skip
"""Name -> what fails, the error that the user must see, and a part of its message."""

NORMS = {"exact": 1e-7, "sketch": 1e-7, "delayed": 1e-7}


def _start(case: str, norm: str, streams: bool, **options: Any) -> TaskBalancer:
    engine = make_engine(case, lr=1e-4)
    if CASES[case].apart:
        options |= {"parallel": "tasks", "groups": {task: tuple(range(dist.get_world_size())) for task in toy.TASKS}}
    return TaskBalancer(engine, toy.TASKS, "backbone", Constant(streams), norm=norm, **options)


def _full_step(balancer: TaskBalancer, step: int) -> None:
    done = balancer._combiner.tasks
    for task in toy.TASKS:
        if task not in done:
            run_task(balancer, task, step, micro_steps=2)
    report = balancer.step()
    assert report.applied and not report.skipped, report


def _after(case: str, norm: str, streams: bool, path: str | None, first: int) -> dict[str, torch.Tensor]:
    """Return the weights after `first` full steps, the error, and two more."""
    balancer = _start(case, norm, streams)
    for step in range(first):
        _full_step(balancer, step)
    if path is not None:
        call, kind, text = PATHS[path]
        run_task(balancer, "det", first, micro_steps=2)
        try:
            call(balancer)
        except BaseException as error:
            if not isinstance(error, kind) or text not in str(error):
                raise
            notes = getattr(error, "__notes__", [])
            assert not notes, (path, notes)
        else:
            raise AssertionError(f"{path}: nothing was raised")
    for step in range(first, first + 2):
        _full_step(balancer, step)
    result = weights(balancer.engine)
    finish(balancer)
    return result


def _failures(case: str, norm: str, streams: bool, first: int) -> list[str]:
    wanted, failures = _after(case, norm, streams, None, first), []
    for path in PATHS:
        if path in ("in the norm", "in the weighting") and (norm != "exact" or (path == "in the norm" and first)):
            pass
        try:
            change = largest_change(wanted, _after(case, norm, streams, path, first))
            if not change <= NORMS[norm]:
                failures.append(f"{case} {norm} {streams} {path}: {change:.1e}")
        except BaseException as error:
            failures.append(f"{case} {norm} {streams} {path}: {type(error).__name__} {str(error)[:200]} " + traceback.format_exc()[-900:])
    return failures
