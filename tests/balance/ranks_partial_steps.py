"""Checks of partial steps, skipped tasks and fp16 overflow (see `ranks_balancer.py`)."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist

from allinone_ds import TBGC, TaskBalancer
from allinone_ds.testing.reference import gradients
from tests.balance.engines import (
    CASES,
    FP32_KINDS,
    finish,
    largest_change,
    make_balancer,
    make_engine,
    run_task,
    toy,
    weights,
)


def check_heads_of_absent_tasks_do_not_move() -> None:
    for case in (*FP32_KINDS, "zero1 bf16 fp32-accumulation", "zero2 bf16", "zero3 bf16", "zero0 bf16",
                 "zero2 fp32 one param group", "zero3 fp32 one param group"):  # fmt: skip
        for optimizer in ("adamw", "momentum"):
            engine = make_engine(case, optimizer)
            balancer = make_balancer(engine)
            for task in toy.TASKS:
                run_task(balancer, task)
            balancer.step()
            before = weights(engine)
            run_task(balancer, "det", step=1)
            report = balancer.step(require_all=False)
            after = weights(engine)
            for still in ("heads.seg", "heads.cls", "late"):
                assert largest_change(before, after, still) == 0.0, (case, optimizer, still)
            assert largest_change(before, after, "heads.det") > 0 and largest_change(before, after, "backbone.stem") > 0
            assert set(report.norms) == {"det"}
            for task in toy.TASKS:
                run_task(balancer, task, step=2)
            balancer.step()
            assert largest_change(after, weights(engine), "heads.seg") > 0, (case, optimizer, "trains on")
            finish(balancer)


def check_heads_on_a_frozen_backbone_do_not_move_either() -> None:
    """All that is trained is balanced; a task that is absent or not finite leaves its head as it is."""
    for case in ("zero0 fp32", "zero2 fp32", "zero3 fp32"):
        engine = make_engine(case, "adamw")
        everything = [p for p in engine.module.parameters() if p.requires_grad]
        balancer = TaskBalancer(engine, toy.TASKS, everything, TBGC(0.1))
        for task in toy.TASKS:
            run_task(balancer, task)
        balancer.step()
        before = weights(engine)
        run_task(balancer, "det", step=1)
        run_task(balancer, "seg", step=1, factor=float("nan"))
        assert balancer.step(require_all=False).skipped == ("seg",)
        after = weights(engine)
        for still in ("heads.seg", "heads.cls", "late"):
            assert largest_change(before, after, still) == 0.0, (case, still)
        assert largest_change(before, after, "heads.det") > 0 and largest_change(before, after, "backbone.stem") > 0
        finish(balancer)


def check_partial_steps_equal_torch_with_absent_gradients() -> None:
    """AdamW over full and partial steps: heads' momentum, decay and step counts as if the heads had not been there."""
    full_first = (toy.TASKS, ("det",), ("seg", "cls"), toy.TASKS)
    for steps in (full_first, full_first[1:]):  # a head may meet the optimizer's state before its first step
        _compare_partial_steps(steps)


def _compare_partial_steps(steps: tuple[tuple[str, ...], ...]) -> None:
    world = dist.get_world_size()
    model = toy.make_model()
    reference = torch.optim.AdamW(toy.param_groups(model), lr=0.01, weight_decay=0.1)
    for step, tasks in enumerate(steps):
        reference.zero_grad()
        for task in tasks:
            found = gradients(model, task, step, 1, world)
            norm = torch.cat([v.reshape(-1) for n, v in found.items() if n.startswith("backbone.")]).norm()
            for name, value in found.items():
                param = model.get_parameter(name)
                scaled = value * min(1.0, 0.1 / (float(norm) + 1e-6))
                param.grad = scaled if param.grad is None else param.grad + scaled
        reference.step()
    for case in FP32_KINDS:
        engine = make_engine(case, "adamw")
        balancer = make_balancer(engine)
        for step, tasks in enumerate(steps):
            for task in tasks:
                run_task(balancer, task, step)
            balancer.step(require_all=False)
        got = weights(engine)
        for name, param in model.named_parameters():
            if name != "backbone.unused":  # without a gradient anywhere: DeepSpeed decays it, torch does not
                torch.testing.assert_close(got[name], param.detach(), rtol=0, atol=2e-5, msg=f"{case} {name}")
        finish(balancer)


class TiedModel(toy.ToyModel):
    """The heads of "seg" and "cls" read through a layer that they share, that of "det" through one of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(13, 13)
        for layer in (self.heads, self.mix):
            layer.double()

    def loss(self, task: str, features: torch.Tensor, last: bool = False) -> torch.Tensor:
        return super().loss(task, self.backbone.blocks[0](features) if task == "det" else self.mix(features), last)


def _tied_model() -> TiedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TiedModel().double()


def check_a_tied_layer_is_the_backbones_or_moves_with_any_of_its_tasks() -> None:
    """Tied to the backbone: measured and scaled with it. Tied between heads: not measured, still without its tasks."""
    steps, world = (toy.TASKS, ("det",), ("seg",), toy.TASKS), dist.get_world_size()

    def groups(model: TiedModel) -> list[dict]:
        return [*toy.param_groups(model), {"params": list(model.mix.parameters())}]

    model = _tied_model()
    reference = torch.optim.AdamW(groups(model), lr=0.01, weight_decay=0.1)
    for step, tasks in enumerate(steps):
        reference.zero_grad()
        for task in tasks:
            found = gradients(model, task, step, 1, world)
            norm = torch.cat([v.reshape(-1) for n, v in found.items() if n.startswith("backbone.")]).norm()
            for name, value in found.items():
                param = model.get_parameter(name)
                scaled = value * min(1.0, 0.1 / (float(norm) + 1e-6))
                param.grad = scaled if param.grad is None else param.grad + scaled
        reference.step()
    for case in ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32"):
        trained = _tied_model().float()
        optimizer = torch.optim.AdamW(groups(trained), lr=0.01, weight_decay=0.1)
        engine = deepspeed.initialize(model=trained, optimizer=optimizer, config=CASES[case].config())[0]
        balancer = make_balancer(engine)
        for step, tasks in enumerate(steps):
            before = weights(engine)
            for task in tasks:
                run_task(balancer, task, step)
            balancer.step(require_all=False)
            assert (largest_change(before, weights(engine), "mix.") == 0.0) == (tasks == ("det",)), (case, step)
        got = weights(engine)
        for name, param in model.named_parameters():
            if name != "backbone.unused":
                torch.testing.assert_close(got[name], param.detach(), rtol=0, atol=2e-5, msg=f"{case} {name}")
        finish(balancer)


def check_non_finite_task_is_left_out_on_all_ranks() -> None:
    """Inf on the last rank only: all ranks leave the task out, its head stands still, the others train on."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for case in (*FP32_KINDS, "zero1 bf16 fp32-accumulation", "zero2 bf16"):
        for weighting in (TBGC(0.1), TBGC(target="mean")):
            engine = make_engine(case, "adamw")
            balancer = make_balancer(engine, weighting)
            for task in toy.TASKS:
                run_task(balancer, task)
            balancer.step()
            before = weights(engine)
            for task in toy.TASKS:
                run_task(balancer, task, 1, factor=float("inf") if task == "seg" and last else 1.0)
            report = balancer.step()
            after = weights(engine)
            assert report.skipped == ("seg",) and float(report.scales["seg"]) == 0.0 and not report.overflow, case
            assert balancer.skipped_steps == {"det": 0, "seg": 1, "cls": 0}
            assert largest_change(before, after, "heads.seg") == 0.0, case
            assert largest_change(before, after, "heads.det") > 0 and largest_change(before, after, "backbone.stem") > 0
            assert all(bool(torch.isfinite(v).all()) for v in after.values()), case
            finish(balancer)


def check_a_step_of_non_finite_tasks_only_moves_nothing() -> None:
    engine = make_engine("zero2 fp32", "adamw")
    balancer = make_balancer(engine)
    before = weights(engine)
    for task in toy.TASKS:
        run_task(balancer, task, factor=float("nan"))
    report = balancer.step()
    assert report.skipped == toy.TASKS and not report.applied
    assert largest_change(before, weights(engine)) == 0.0
    for task in toy.TASKS:
        run_task(balancer, task)
    assert balancer.step().applied and largest_change(before, weights(engine)) > 0
    finish(balancer)


def check_fp16_overflow_follows_the_loss_scaler() -> None:
    for case in ("zero0 fp16", "zero1 fp16", "zero2 fp16", "zero3 fp16"):
        fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1}
        engine = make_engine(case, fp16=fp16)
        balancer = make_balancer(engine)
        before, scale = weights(engine), balancer._adapter.loss_scale
        for task in toy.TASKS:
            run_task(balancer, task, factor=3e4 if task == "seg" else 1.0)  # finite loss, gradient beyond 65504
        report = balancer.step()
        assert report.overflow and not report.skipped and not report.applied, case
        assert largest_change(before, weights(engine)) == 0.0, case
        assert balancer._adapter.loss_scale == scale / 2, (case, balancer._adapter.loss_scale)
        for task in toy.TASKS:
            run_task(balancer, task, factor=float("nan") if task == "seg" else 1.0)  # not the scaler's business
        report = balancer.step()
        assert report.skipped == ("seg",) and report.applied and balancer._adapter.loss_scale == scale / 2, case
        assert largest_change(before, weights(engine), "heads.det") > 0, case
        finish(balancer)
