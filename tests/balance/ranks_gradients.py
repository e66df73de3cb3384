"""Checks of what DeepSpeed's accessors of gradients return in a block, and of step counts (see `ranks_balancer.py`)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad

from allinone_ds import Sum
from allinone_ds.distributed import any_rank
from allinone_ds.testing.reference import gradients
from tests.balance.engines import FP32_KINDS, finish, inputs, make_balancer, make_engine, run_task, toy, weights

NAME = "backbone.stem.weight"


def batch(engine, task: str, step: int, k: int) -> torch.Tensor:
    return inputs(engine, task, step, k)


def check_a_gradient_is_read_and_set_after_the_last_backward_of_its_block() -> None:
    """There `safe_get_full_grad` is the task's gradient, and what `safe_set_full_grad` sets is what is balanced."""
    for case in (*FP32_KINDS, "zero2 bf16", "zero3 bf16"):
        engine = make_engine(case, lr=0.0)
        balancer = make_balancer(engine, Sum())
        param = engine.module.get_parameter(NAME)
        limit = 1e-6 if "fp32" in case else 2e-2
        for step, factor in enumerate((1.0, 3.0)):
            wanted = {task: gradients(toy.make_model(), task, step, 2, dist.get_world_size()) for task in toy.TASKS}
            for task in toy.TASKS:
                with balancer.task(task, micro_steps=2):
                    for k in range(2):
                        balancer.backward(engine(task, batch(engine, task, step, k), k == 1))
                    got = safe_get_full_grad(param).double()
                    assert (got - wanted[task][NAME]).abs().max() < limit * wanted[task][NAME].abs().max(), (case, task)
                    if case == "zero3 fp32":
                        size = safe_get_local_grad(param).numel()
                        assert size == -(-got.numel() // dist.get_world_size())
                    if factor != 1 and "zero3" not in case:
                        safe_set_full_grad(param, (got * factor).to(param.dtype))
            norms = balancer.step().norms
            for task, found in wanted.items():
                if "zero3" not in case:  # DeepSpeed cannot set a gradient that the ranks do not divide evenly
                    found[NAME] = found[NAME] * factor
                square = sum(v.square().sum() for n, v in found.items() if n.startswith("backbone."))
                relative = float(norms[task]) / float(square) ** 0.5
                assert abs(relative - 1) < max(limit, 1e-5), (case, task, factor, relative)
        finish(balancer)


def moved_after_partial_steps(case: str) -> dict[str, torch.Tensor]:
    engine = make_engine(case, "adamw")
    balancer = make_balancer(engine)
    for step, tasks in enumerate((toy.TASKS, *[("det",)] * 6, toy.TASKS)):
        for task in tasks:
            run_task(balancer, task, step)
        balancer.step(require_all=False)
    result = weights(engine)
    finish(balancer)
    return result


def warned(caught: list[warnings.WarningMessage]) -> bool:
    return any("counts steps per parameter group" in str(w.message) for w in caught)


def check_step_counts_that_parameters_share_are_warned_of() -> None:
    """Six steps of one task in between: with a group per head the others' AdamW counts their own steps."""
    for stage in (1, 2, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apart = moved_after_partial_steps(f"zero{stage} fp32")
        assert not warned(caught)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            together = moved_after_partial_steps(f"zero{stage} fp32 one param group")
        assert any_rank(warned(caught)), stage  # a rank that holds no head of an absent task has no reason to
        change = {name: float((apart[name] - together[name]).abs().max()) for name in apart}
        assert change["heads.det.weight"] < 1e-5 < 1e-4 < change["heads.seg.weight"], (stage, change)
