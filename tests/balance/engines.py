"""Engines of the toy model, and helpers that the checks share; imported on ranks."""

from __future__ import annotations

from functools import partial

import deepspeed
import torch
import torch.distributed as dist

from allinone_ds import TBGC, TaskBalancer, task_features, weighting_from_config
from allinone_ds.testing import cases, exactness, toy
from allinone_ds.testing.muon import muon
from allinone_ds.zero.params import whole_master

__all__ = ["CASES", "FP32_KINDS", "cases", "finish", "inputs", "largest_change", "make_balancer", "make_engine",
           "raises", "run_case", "run_task", "toy", "weights", "whole_master"]  # fmt: skip

CASES = {case.name: case for case in cases.all_cases()}
FP32_KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload")


def make_engine(case: str = "zero2 fp32", optimizer: str = "sgd", lr: float = 0.05, **config):
    """A toy engine of a named case; keyword arguments replace keys of its config."""
    model = toy.make_model().float()
    groups = toy.param_groups(model, per_head=not CASES[case].one_group)
    if "muon" in CASES[case].optimizer or optimizer == "muon":
        chosen = muon(model)
    elif optimizer == "sgd":
        chosen = torch.optim.SGD(groups, lr=lr)
    elif optimizer == "momentum":
        chosen = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1)
    else:
        chosen = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=chosen, config={**CASES[case].config(), **config})[0]


def make_balancer(engine, weighting=None, **options) -> TaskBalancer:
    return TaskBalancer(engine, toy.TASKS, "backbone", weighting or TBGC(0.1), **{"self_test": False, **options})


def _from_config(engine, weighting, **options) -> TaskBalancer:
    engine.module.mark = task_features
    weighting = weighting_from_config(weighting)
    return TaskBalancer(engine, toy.TASKS, "backbone", weighting, **{"self_test": False, **options})


run_case = partial(exactness.run_case, make_balancer=_from_config, whole_master=whole_master)


def inputs(engine, task: str, step: int, k: int, rank: int | None = None) -> torch.Tensor:
    """The micro-batch of a rank (None: of this one) on the engine's device, in the dtype of its weights."""
    made = toy.inputs(task, step, k, dist.get_rank() if rank is None else rank)
    return made.to(engine.device, next(engine.module.parameters()).dtype)


def run_task(balancer: TaskBalancer, task: str, step: int = 0, micro_steps: int = 1, factor: float = 1.0) -> None:
    with balancer.task(task, micro_steps):
        for k in range(micro_steps):
            x = inputs(balancer.engine, task, step, k)
            balancer.backward(balancer.engine(task, x, k == micro_steps - 1) * factor)


def weights(engine) -> dict[str, torch.Tensor]:
    """All weights, whole, on every rank, on the CPU."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().double().cpu().clone()
    return found


def largest_change(before: dict, after: dict, prefix: str = "") -> float:
    return max(float((after[n] - before[n]).abs().max()) for n in before if n.startswith(prefix))


def raises(kind, text: str, call) -> None:
    """`call` raises `kind` with `text` in its message."""
    try:
        call()
    except kind as error:
        assert text in str(error), f"'{text}' not in: {error}"
        return
    raise AssertionError(f"nothing was raised; expected {kind} with '{text}'")


def finish(balancer: TaskBalancer) -> None:
    balancer.detach()
    balancer.engine.destroy()
