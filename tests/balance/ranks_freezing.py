"""Checks of backbones that are frozen and thawed under an engine (see `ranks_balancer.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import deepspeed
import torch
import torch.distributed as dist

from allinone_ds import DBMTL, TBGC, TaskBalancer, Weighting, task_features
from allinone_ds.testing.reference import gradients, norm_of
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

BLOCK = ("backbone.blocks.1.",)
STAGES = (("backbone.",), ("backbone.",), BLOCK, BLOCK, (), ())
"""Prefixes of the frozen parameters in each step."""


def _groups(model: toy.ToyModel) -> list[dict]:
    """As `toy.param_groups`, and a group of its own for the block that is thawed later than the rest."""
    first, *heads = toy.param_groups(model)
    block = list(model.backbone.blocks[1].parameters())
    rest = [p for p in first["params"] if all(p is not other for other in block)]
    return [{"params": rest}, {"params": block}, *heads]


def _freeze(model: torch.nn.Module, prefixes: Sequence[str]) -> None:
    for name, param in model.named_parameters():
        if not name.startswith("backbone.frozen."):
            param.requires_grad_(not name.startswith(tuple(prefixes)))


def _engine(case: str) -> deepspeed.DeepSpeedEngine:
    model = toy.make_model().float()
    optimizer = torch.optim.AdamW(_groups(model), lr=0.01, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CASES[case].config())[0]


def check_what_is_thawed_trains_as_if_it_were_new_to_the_optimizer() -> None:
    """AdamW while all, then one block, then nothing of the backbone is frozen: no decay, momentum or counted step."""
    world = dist.get_world_size()
    model = toy.make_model()
    reference = torch.optim.AdamW(_groups(model), lr=0.01, weight_decay=0.1)
    for step, frozen in enumerate(STAGES):
        _freeze(model, frozen)
        reference.zero_grad()
        for task in toy.TASKS:
            found = gradients(model, task, step, 1, world)
            shared = [v.reshape(-1) for n, v in found.items() if n.startswith("backbone.")]
            factor = min(1.0, 0.1 / (float(torch.cat(shared).norm()) + 1e-6)) if shared else 1.0
            for name, value in found.items():
                param = model.get_parameter(name)
                param.grad = value * factor if param.grad is None else param.grad + value * factor
        reference.step()
    for case in FP32_KINDS:
        engine, balancer, before = _engine(case), None, {}
        for step, frozen in enumerate(STAGES):
            if balancer is None or frozen != STAGES[step - 1]:
                if balancer is not None:
                    balancer.detach()
                _freeze(engine.module, frozen)
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    balancer = make_balancer(engine)
                told = [w for w in said if "nothing to balance" in str(w.message)]
                assert len(told) == (frozen == ("backbone.",) and dist.get_rank() == 0), (case, step, told)
                assert balancer.nothing_shared == (frozen == ("backbone.",))
                before = weights(engine)
            for task in toy.TASKS:
                run_task(balancer, task, step)
            report = balancer.step()
            assert report.applied and not report.skipped
            for prefix in frozen:
                assert largest_change(before, weights(engine), prefix) == 0.0, (case, step, prefix)
        got = weights(engine)
        for name, param in model.named_parameters():
            if name != "backbone.unused":  # without a gradient anywhere: DeepSpeed decays it, torch does not
                torch.testing.assert_close(got[name], param.detach(), rtol=0, atol=2e-5, msg=f"{case} {name}")
        finish(balancer)


def check_what_is_frozen_stands_still_on_every_engine() -> None:
    """Also where a parameter group holds frozen and trained parameters, and with momentum from before."""
    for case in ("zero0 fp32", "zero1 bf16 fp32-accumulation", "zero2 bf16", "zero3 bf16", "zero0 bf16", "zero0 fp16",
                 "zero2 fp32 one param group", "zero3 fp32 one param group"):  # fmt: skip
        for optimizer in ("adamw", "momentum"):
            engine = make_engine(case, optimizer)
            balancer = make_balancer(engine)
            for task in toy.TASKS:
                run_task(balancer, task)
            balancer.step()
            balancer.detach()
            _freeze(engine.module, BLOCK)
            balancer = make_balancer(engine)
            before = weights(engine)
            for step in (1, 2):
                for task in toy.TASKS:
                    run_task(balancer, task, step)
                balancer.step()
            after = weights(engine)
            assert largest_change(before, after, BLOCK[0]) == 0.0, (case, optimizer)
            assert largest_change(before, after, "backbone.stem") > 0 and largest_change(before, after, "late") > 0
            finish(balancer)


FROZEN = (
    (TBGC(target="mean"), "exact", "features"),
    (TBGC(target="mean"), "exact", "backbone"),
    (DBMTL(), "exact", None),
    (TBGC(0.001), "features", "features"),
    (TBGC(0.001), "features", None),
)
"""Weightings that divide by norms or scale, where norms come from, and the place of a joint block (None: no joint)."""


def check_heads_on_a_frozen_backbone_get_their_raw_gradients() -> None:
    for case in ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32"):
        for weighting, norm, at in FROZEN:
            _compare_heads(case, weighting, norm, at)


def _compare_heads(case: str, weighting: Weighting, norm: str, at: str | None) -> None:
    expected: dict[str, torch.Tensor] = {}
    reference = toy.make_model()
    reference.backbone.requires_grad_(False)
    for task in toy.TASKS:
        expected |= gradients(reference, task, 0, 1, dist.get_world_size(), None if at is None else toy.TASKS[0])
    model = toy.make_model().float()
    model.backbone.requires_grad_(False)
    model.mark = task_features
    groups = [{"params": list(module.parameters())} for module in (*model.heads.values(), model.late)]
    config = CASES[case].config()
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=1.0), config=config)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balancer = TaskBalancer(engine, toy.TASKS, "backbone", weighting, norm=norm)
    before = weights(engine)
    if at is None:
        for task in toy.TASKS:
            run_task(balancer, task)
    else:
        with balancer.joint(toy.TASKS, at=at):
            balancer.backward(engine(toy.TASKS, inputs(engine, toy.TASKS[0], 0, 0), True))
    report = balancer.step()
    after = weights(engine)
    assert report.applied and all(float(scale) == 1.0 for scale in report.scales.values()), (case, weighting, at)
    for name, value in expected.items():
        bound = 1e-5 * float(value.abs().max()) + 1e-6
        torch.testing.assert_close(before[name] - after[name], value, rtol=1e-4, atol=bound, msg=f"{case} {at} {name}")
    assert largest_change(before, after, "backbone.") == 0.0
    own = norm_of([value for name, value in expected.items() if name.startswith("heads.cls")])
    assert abs(float(report.norms["cls"]) / own - 1) < 1e-4
    finish(balancer)


def check_nothing_trainable_at_all_is_refused() -> None:
    engine = make_engine("zero2 fp32")
    engine.module.requires_grad_(False)
    raises(ValueError, "nothing to train", lambda: make_balancer(engine))
    engine.module.backbone.stem.requires_grad_(True)
    make_balancer(engine).detach()
    engine.destroy()
