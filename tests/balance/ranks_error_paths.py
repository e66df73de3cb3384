"""Checks that every error leaves the balancer usable, and is the one that the user sees (see `ranks_balancer.py`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from allinone_ds import TaskBalancer, Weighting, weighting_from_config
from allinone_ds.balance.combiners import base
from allinone_ds.errors import BalancerError
from allinone_ds.testing.reference import reference_run
from tests.balance.engines import CASES, finish, inputs, largest_change, make_engine, run_task, toy, weights


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


def _told(config: dict[str, Any]) -> Weighting:
    """Return a weighting that raises, after it has changed its state, while its attribute `bad` is set."""
    weighting = weighting_from_config(config)
    factors, weighting.bad = weighting.factors, False

    def told(record):
        result = factors(record)
        return _fail() if weighting.bad else result

    weighting.factors = told
    return weighting


def loss_of(balancer: TaskBalancer, k: int = 0) -> torch.Tensor:
    return balancer.engine("seg", inputs(balancer.engine, "seg", 0, k), True)


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

INSIDE = ("micro-step 2", "hook", "a forward", "a backward", "swallowed", "after the backward", "the weighting",
          "the optimizer")  # fmt: skip
"""Paths that leave something behind in the engine."""
WEIGHTINGS = {
    "constant": {"name": "tbgc", "max_norm": 0.1}, "mean": {"name": "tbgc", "target": "mean"},
    "learned": {"name": "uncertainty"}, "averaged": {"name": "db_mtl", "beta": 0.5},
}  # fmt: skip
"""TBGC has a float64 reference; others are compared with a run without an error."""
STEPS = 3


def _run(case: str, norm: str, target: str, path: str | None) -> dict[str, torch.Tensor]:
    """Return the weights after `STEPS` steps, with an error in the second one."""
    config = WEIGHTINGS[target]
    engine = make_engine(case, lr=toy.rate(config))
    groups = {task: tuple(range(dist.get_world_size())) for task in toy.TASKS}
    apart = {"parallel": "tasks", "groups": groups} if CASES[case].apart else {}
    balancer = TaskBalancer(engine, toy.TASKS, "backbone", _told(config), norm=norm, **apart)
    for step in range(STEPS):
        if step == 1 and path is not None:
            call, kind, text = PATHS[path]
            run_task(balancer, "det", step)
            try:
                call(balancer)
            except BaseException as error:
                if not isinstance(error, kind) or text not in str(error):
                    raise
                assert not getattr(error, "__notes__", []), "all ranks have the same error, and nothing else failed"
            else:
                raise AssertionError("nothing was raised")
        done = balancer._combiner.tasks
        for task in toy.TASKS:
            if task not in done:
                run_task(balancer, task, step)
        report = balancer.step()
        assert report.applied and not report.skipped, report
    result = weights(engine)
    finish(balancer)
    return result


def errors_leave_no_trace(case: str, norm: str, target: str, part: tuple[str, ...] = ("",)) -> None:
    """Whatever fails in a step, the same error is seen, and repeating what failed gives what the reference gives.

    Args:
        case: engine.
        norm: of the balancer.
        target: of the weighting: one task at a time, or all together.
        part: of the names of the paths to try.
    """
    start = {name: p.detach() for name, p in toy.make_model().named_parameters()}
    counts = dict.fromkeys(toy.TASKS, 1)
    if WEIGHTINGS[target]["name"] == "tbgc":
        wanted = reference_run(
            WEIGHTINGS[target], STEPS, counts, dist.get_world_size(), delayed=norm == "delayed"
        ).params
    else:
        wanted = _run(case, norm, target, None)
    limit = (1e-5 if norm == "exact" else 2e-3) * largest_change(start, wanted)
    for path in [None, *(path for path in PATHS if any(text in path for text in part))]:
        if path == "in the norm" and (norm != "exact" or CASES[case].apart):
            continue  # it is not computed there
        try:
            change = largest_change(wanted, _run(case, norm, target, path))
            assert change <= limit, f"the weights are off by {change:.1e}, limit {limit:.1e}"
        except BaseException as error:
            raise AssertionError(f"{case}, norm {norm}, an error {path}: {error!r}") from error


CHECKS = {
    "errors_leave_no_trace[zero0]": ("zero0 fp32", "exact", "constant"),
    "errors_leave_no_trace[zero1]": ("zero1 fp32", "exact", "constant", INSIDE),
    "errors_leave_no_trace[zero2]": ("zero2 fp32", "exact", "mean"),
    "errors_leave_no_trace[zero3]": ("zero3 fp32", "exact", "constant"),
    "errors_leave_no_trace[zero2 offload]": ("zero2 fp32 offload", "exact", "constant", INSIDE),
    "errors_leave_no_trace[zero3 offload]": ("zero3 fp32 offload", "exact", "mean", INSIDE),
    "errors_leave_no_trace[zero1 delayed]": ("zero1 fp32", "delayed", "mean", INSIDE),
    "errors_leave_no_trace[zero1 learned]": ("zero1 fp32", "exact", "learned", ("the ",)),
    "errors_leave_no_trace[zero2 averaged]": ("zero2 fp32", "exact", "averaged", ("the ",)),
    "errors_leave_no_trace[zero2 delayed averaged]": ("zero2 fp32", "delayed", "averaged", ("the ",)),
    "errors_leave_no_trace[zero3 delayed]": ("zero3 fp32", "delayed", "constant", INSIDE),
    "errors_leave_no_trace[zero2 sketch]": ("zero2 fp32", "sketch", "constant", INSIDE),
    "errors_leave_no_trace[zero3 sketch]": ("zero3 fp32", "sketch", "constant", INSIDE),
    "errors_leave_no_trace[zero2 apart]": ("zero2 fp32 tasks apart", "exact", "mean", INSIDE),
    "errors_leave_no_trace[zero1 apart sketch]": ("zero1 fp32 tasks apart", "sketch", "constant", INSIDE),
}
"""Name -> arguments of `errors_leave_no_trace`."""


def all_paths(world: int) -> dict[str, Callable[[], None]]:
    """Return the checks of a number of ranks."""
    one = ("zero0", "zero2", "zero3", "zero1 delayed")
    names = CHECKS if world == 2 else [f"errors_leave_no_trace[{name}]" for name in one if world == 1]
    return {name: partial(errors_leave_no_trace, *CHECKS[name]) for name in names}
