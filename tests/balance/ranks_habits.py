"""Checks of what users call beside a balancer, inside its blocks and around them (see `ranks_balancer.py`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from tempfile import mkdtemp

import torch
import torch.distributed as dist
from torch import nn

from allinone_ds import TBGC, Sum, TaskBalancer
from allinone_ds.errors import BalancerError, ConfigError, UnsupportedEngine
from allinone_ds.zero import support
from tests.balance.engines import (
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

KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload")


def batch(engine, task: str, step: int, k: int = 0) -> torch.Tensor:
    return inputs(engine, task, step, k)


def train(case: str, norm: str, steps: int, call: Callable = lambda engine: None) -> list[dict]:
    """Train with 2 micro-steps per task and call `call` in every block and between them; return all weights."""
    engine = make_engine(case, "adamw")
    balancer = make_balancer(engine, norm=norm)
    results = []
    for step in range(steps):
        call(engine)
        for task in toy.TASKS:
            with balancer.task(task, micro_steps=2):
                for k in range(2):
                    call(engine)
                    balancer.backward(engine(task, batch(engine, task, step, k), k == 1))
            call(engine)
        balancer.step()
        results.append(weights(engine))
    finish(balancer)
    return results


def norms_of(case: str) -> tuple[str, ...]:
    return ("exact", "delayed") if case == "zero1 fp32" else ("exact",)


def evaluate(engine) -> None:
    engine.eval()
    with torch.no_grad():
        engine("cls", batch(engine, "cls", 99))
    engine.train()


def only_forward(engine) -> None:
    engine("cls", batch(engine, "cls", 99))


def boundary(engine, value: bool) -> None:
    engine.set_gradient_accumulation_boundary(value)


def gradient_of_inputs(engine) -> None:
    """A gradient of the user's own, which no parameter gets: of the inputs, and of parameters."""
    x = batch(engine, "cls", 98).requires_grad_()
    torch.autograd.grad(engine.module("cls", x), x)


def gradient_of_parameters(engine) -> None:
    torch.autograd.grad(engine.module("cls", batch(engine, "cls", 98)), list(engine.module.heads["cls"].parameters()))


SERVED = {
    "evaluate": evaluate,
    "only_forward": only_forward,
    "boundary True": partial(boundary, value=True),
    "boundary False": partial(boundary, value=False),
    "gradient_of_inputs": gradient_of_inputs,
    "save": lambda engine: engine.save_checkpoint(save_folder(), tag="middle"),
}
"""What may be called inside a block and between blocks, without any effect on the step."""


def save_folder() -> str:
    folder = [mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return folder[0]


def check_calls_that_are_served_change_nothing() -> None:
    """All of them, one after another, in every block before each micro-step, and between blocks."""

    def every(engine) -> None:
        for call in SERVED.values():
            call(engine)
        if engine.zero_optimization_stage() < 3:  # ZeRO-3 has partitioned the parameters
            gradient_of_parameters(engine)

    for case in KINDS:
        for norm in norms_of(case):
            apart = largest_change(train(case, norm, 2)[-1], train(case, norm, 2, every)[-1])
            assert apart < 1e-6, (case, norm, apart)


def other_backward(engine) -> None:
    engine("seg", batch(engine, "seg", 97)).backward()


def backward_of_module(engine) -> None:
    engine.module("seg", batch(engine, "seg", 97)).backward()


REFUSED = {
    "engine.backward": (lambda engine: engine.backward(engine("seg", batch(engine, "seg", 97))), "use balancer.back"),
    "engine.step": (lambda engine: engine.step(), "engine.step() was called in the middle of a step"),
    "optimizer.step": (lambda engine: engine.optimizer.step(), "optimizer.step() was called in the middle of a step"),
    "basic_optimizer.step": (lambda engine: engine.basic_optimizer.step(), "optimizer.step() was called"),
    "engine.zero_grad": (lambda engine: engine.zero_grad(), "engine.zero_grad() was called in the middle of a step"),
    "optimizer.zero_grad": (lambda engine: engine.optimizer.zero_grad(), "optimizer.zero_grad() was called"),
    "engine.load_checkpoint": (lambda engine: engine.load_checkpoint("no folder"), "use it between steps"),
    "loss.backward": (other_backward, "a backward outside balancer.backward()"),
    "loss.backward of the module": (backward_of_module, "a backward outside balancer.backward()"),
}
"""What may not be called in a step -> the call, and what its error says."""


def check_calls_that_are_refused_leave_the_step_usable() -> None:
    """After the error, and `abandon` where it was outside a block, training goes on as if nothing had been called."""
    for case in KINDS:
        for norm in norms_of(case):
            calls = dict(REFUSED)
            if case != "zero0 fp32":
                del calls["optimizer.step"]  # DeepSpeed's own has used up the gradients before it comes to the user's
            if case == "zero0 fp32":
                calls["loss.backward"] = (other_backward, "Direct calls to tensor.backward() are not supported")
            wanted = train(case, norm, 2 * len(calls))
            engine = make_engine(case, "adamw")
            balancer = make_balancer(engine, norm=norm)
            places = [(name, where) for name in calls for where in ("inside", "between")]
            for step, (name, where) in enumerate(places):
                disturbed_step(balancer, step, where, norm, *calls[name])
                apart = largest_change(wanted[step], weights(engine))
                limit = 1e-6 if norm == "exact" else 1e-3  # each step that begins draws new sketches
                assert apart < limit, (case, norm, name, where, apart)
            finish(balancer)


def disturbed_step(balancer, step: int, where: str, norm: str, call: Callable, message: str) -> None:
    engine = balancer.engine

    def run(task: str, disturb: bool = False) -> None:
        with balancer.task(task, micro_steps=2):
            for k in range(2):
                balancer.backward(engine(task, batch(engine, task, step, k), k == 1))
                if disturb and k == 0:
                    call(engine)

    run("det")
    disturbing = partial(run, "seg", True) if where == "inside" else partial(call, engine)
    raises((BalancerError, RuntimeError), message, disturbing)
    if where == "between" or norm == "delayed":
        balancer.abandon()
        run("det")
    run("seg")
    run("cls")
    balancer.step()


def check_gradients_of_earlier_micro_steps_may_not_be_removed() -> None:
    """`module.zero_grad()` between micro-steps: an error where they are on the parameters, without effect elsewhere."""
    for case, norm in (("zero0 fp32", "exact"), ("zero1 fp32", "exact"), ("zero2 fp32", "exact"),
                       ("zero3 fp32", "exact"), ("zero2 fp32", "sketch")):  # fmt: skip
        wanted = train(case, norm, 1)[0]
        engine = make_engine(case, "adamw")
        balancer = make_balancer(engine, norm=norm)
        kept = case in ("zero0 fp32", "zero1 fp32") or norm != "exact"
        step = partial(disturbed_step, balancer, 0, "inside", norm, lambda engine: engine.module.zero_grad())
        if kept:
            step("gradients of an earlier micro-step of this task are gone")
            assert largest_change(wanted, weights(engine)) < (1e-6 if norm == "exact" else 1e-3), (case, norm)
        finish(balancer)
        if not kept:
            assert largest_change(wanted, train(case, norm, 1, lambda e: e.module.zero_grad())[0]) < 1e-6, case


def check_zero_grad_and_loading_are_allowed_between_steps() -> None:
    for case in KINDS:
        engine = make_engine(case)
        balancer = make_balancer(engine)
        for step in range(2):
            params = [param for param in engine.module.parameters() if param.numel()]
            for param in params:
                param.grad = torch.ones_like(param)
            engine.zero_grad()
            assert all(param.grad is None for param in params), case
            engine.optimizer.zero_grad()
            for task in toy.TASKS:
                run_task(balancer, task, step)
            balancer.step()
        folder = save_folder()
        engine.save_checkpoint(folder, tag="t")
        saved = weights(engine)
        for task in toy.TASKS:
            run_task(balancer, task, 5)
        balancer.step()
        engine.load_checkpoint(folder, tag="t")
        assert largest_change(saved, weights(engine)) == 0.0, case
        for task in toy.TASKS:
            run_task(balancer, task, 6)
        assert balancer.step().applied
        finish(balancer)


def check_nothing_is_left_on_a_detached_engine() -> None:
    for case in KINDS:
        engine = make_engine(case, lr=0.01)
        make_balancer(engine).detach()
        before = weights(engine)
        engine.zero_grad()
        engine.optimizer.zero_grad()
        engine.backward(engine("det", batch(engine, "det", 0)))
        engine.step()
        assert largest_change(before, weights(engine)) > 0, case
        assert not {"step", "backward", "zero_grad", "load_checkpoint"} & set(vars(engine)), case
        engine.destroy()


# ranks that construct different balancers


def check_ranks_with_different_balancers_are_named() -> None:
    if dist.get_world_size() == 1:
        return
    mine = dist.get_rank() == 1
    for case in ("zero0 fp32", "zero2 fp32", "zero3 fp32"):
        engine = make_engine(case)

        def make(engine=engine, tasks=toy.TASKS, shared="backbone", weighting=None, **options):
            TaskBalancer(engine, tasks, shared, weighting or TBGC(0.1), **options).detach()

        different = {
            "rank 0: tasks = ('det', 'seg', 'cls'); rank 1: tasks = ('cls', 'seg', 'det')": {"tasks": toy.TASKS[::-1]},
            "rank 0: weighting = TBGC(max_norm=0.1, target='constant', rescale='clip', heads='same'); rank 1: weighting"
            " = TBGC(max_norm=0.2": {"weighting": TBGC(0.2)},
            "rank 0: norm = 'exact'; rank 1: norm = 'skech'": {"norm": "skech"},
            "rank 0: cosines_every = 0; rank 1: cosines_every = 5": {"cosines_every": 5},
            "rank 1: parameter 'backbone.unused': (7,), torch.float32, head": {"shared": "backbone.blocks"},
        }
        for text, options in different.items():
            raises(ConfigError, text, partial(make, **(options if mine else {})))
        raises(ConfigError, "rank 1: parameter", partial(make, shared="backbon" if mine else "backbone"))
        raises(ValueError, "did you mean 'backbone'", partial(make, shared="backbon"))
        make()
        make(weighting=Sum(), shared=list(engine.module.backbone.parameters()))
        make(weighting=lambda gram: gram.diagonal())  # its address differs between ranks
        head = engine.module.heads["det"].weight
        if mine:
            head.requires_grad_(False)
        raises(ConfigError, "rank 1: parameter 'heads.det.weight': (5, 13), torch.float32, frozen", make)
        head.requires_grad_(True)
        make()
        engine.destroy()


# engines


class Wrapped:
    """Stands for an engine's attribute that only a cluster can give."""

    def __init__(self, engine, **attributes):
        self.engine, self.attributes = engine, attributes

    def __enter__(self) -> None:
        self.before = {name: getattr(self.engine, name) for name in self.attributes}
        for name, value in self.attributes.items():
            setattr(self.engine, name, value)

    def __exit__(self, *error) -> None:
        for name, value in self.before.items():
            setattr(self.engine, name, value)


class OnebitAdam(torch.optim.SGD):
    pass


def check_parallel_engines_are_refused() -> None:
    engine = make_engine()
    onebit = OnebitAdam([nn.Parameter(torch.ones(1))], lr=0.1)
    for text, attributes in {
        "sequence parallelism": {"sequence_parallel_size": 2},
        "remove mesh_param": {"mesh_device": object()},
        "tensor or model parallelism": {"mpu": object()},
        "mixture-of-experts": {"has_moe_layers": True},
        "the optimizer OnebitAdam": {"basic_optimizer": onebit},
    }.items():
        with Wrapped(engine, **attributes):
            raises(UnsupportedEngine, text, partial(make_balancer, engine))
    hybrid = support.DeepSpeedHybridEngine
    support.DeepSpeedHybridEngine = type(engine)
    try:
        raises(UnsupportedEngine, "the hybrid engine", partial(make_balancer, engine))
    finally:
        support.DeepSpeedHybridEngine = hybrid
    make_balancer(engine).detach()
    engine.destroy()
