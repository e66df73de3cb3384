"""Checks of `norm="features"` on engines of all ZeRO stages; started by test_norm_features.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from allinone_ds import TBGC, Sum, TaskBalancer, task_features
from allinone_ds.balance.self_test import self_test
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.testing.cases import MICRO_STEPS, WEIGHTINGS
from allinone_ds.zero.engines.stage12 import Stage12Adapter
from tests.balance.engines import (
    CASES,
    finish,
    largest_change,
    make_balancer,
    make_engine,
    raises,
    run_case,
    run_task,
    toy,
    weights,
)  # fmt: skip
from tests.launcher import join_ranks, run_checks

KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload")


def open_balancer(kind: str = "zero2 fp32", weighting=None, **options) -> TaskBalancer:
    engine = make_engine(kind, **options)
    engine.module.mark = task_features
    return make_balancer(engine, weighting, norm="features")


def check_weights_and_norms_equal_the_reference() -> None:
    names = [f"zero{stage} fp32 {way}" for stage in range(4) for way in ("norm=features", "norm=features joint")]
    names += [f"zero{stage} fp32 offload norm=features" for stage in (1, 2, 3)]
    names += ["zero1 fp32 overlap=1 norm=features", "zero3 fp32 checkpointing norm=features"]
    names += ["zero1 bf16 fp32-accumulation norm=features", "zero2 fp16 norm=features", "zero3 bf16 norm=features"]
    for name in names:
        found = run_case(CASES[name], WEIGHTINGS["tbgc"], MICRO_STEPS["1/2/4"])
        limits = {"fp32": (2e-7, 1e-6), "fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}[CASES[name].dtype]
        key = "weights" if CASES[name].dtype == "fp32" else "weights_relative"
        assert found[key] < limits[0] and found["norms"] < limits[1], (name, found)


def check_nothing_is_kept_and_zero1_reduces_once() -> None:
    for kind in KINDS:
        balancer = open_balancer(kind)
        for task in toy.TASKS:
            run_task(balancer, task, micro_steps=2)
            if kind in ("zero0 fp32", "zero1 fp32"):
                assert all(not g.any() for g in _reduced(balancer)), (kind, task, "reduced before the step")
        assert balancer.step().applied and balancer.extra_bytes == 0, kind
        finish(balancer)


def _reduced(balancer: TaskBalancer) -> list[torch.Tensor]:
    """Return what the engine has reduced into shards so far."""
    adapter = balancer._adapter
    if not isinstance(adapter, Stage12Adapter):
        return []
    return [torch.ones(1) for shard in adapter.optimizer.averaged_gradients.values() if shard is not None]


def check_a_step_begins_without_what_the_last_one_left() -> None:
    """A partial step, an abandoned one and one after an error equal those of a fresh balancer."""
    for kind in KINDS:
        results = []
        for way in ("fresh", "abandoned", "error"):
            balancer = open_balancer(kind)
            before = weights(balancer.engine)
            if way == "abandoned":
                run_task(balancer, "seg")
                balancer.abandon()
            if way == "error":
                run_task(balancer, "cls")
                raises(ZeroDivisionError, "planned", lambda b=balancer: _failing(b))
                raises(BalancerError, "before task(s) det, seg, cls", balancer.step)
            run_task(balancer, "det")
            report = balancer.step(require_all=False)
            assert report.applied and report.tasks == ("det",), (kind, way)
            after = weights(balancer.engine)
            assert largest_change(before, after, "heads.det") and not largest_change(before, after, "heads.seg")
            results.append(after)
            finish(balancer)
        assert all(largest_change(results[0], other) < 1e-8 for other in results[1:]), kind


def _failing(balancer: TaskBalancer) -> None:
    with balancer.task("seg"):
        x = toy.inputs("seg", 0, 0, dist.get_rank()).float()
        balancer.backward(balancer.engine("seg", x))
        raise ZeroDivisionError("planned")


def check_a_step_with_a_task_that_is_not_finite_is_not_taken() -> None:
    for kind in KINDS:
        balancer = open_balancer(kind, TBGC(max_norm=0.1))
        before = weights(balancer.engine)
        for task in toy.TASKS:
            run_task(balancer, task, factor=float("nan") if task == "seg" else 1.0)
        report = balancer.step()
        assert report.skipped == ("seg",) and not report.applied, (kind, report)
        assert not largest_change(before, weights(balancer.engine)), kind
        assert balancer.skipped_steps["seg"] == 1
        for task in toy.TASKS:
            run_task(balancer, task)
        assert balancer.step().applied and largest_change(before, weights(balancer.engine)), kind
        finish(balancer)


def check_an_overflow_at_the_features_alone_lowers_the_loss_scale() -> None:
    """The engine sees no gradient that is not finite, and would step without the task's part."""
    for kind in ("zero0 fp16", "zero1 fp16", "zero2 fp16", "zero3 fp16", "zero2 fp16 offload"):
        for joint in (False, True):
            fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 2, "hysteresis": 1}
            balancer = open_balancer(kind, fp16=fp16)
            broken = {"seg": True}

            def mark(features, task, broken=broken):
                marked = task_features(features, task)
                if broken.get(task) and marked.requires_grad:
                    marked.register_hook(lambda gradient: gradient * torch.inf)
                return marked

            balancer.engine.module.mark = mark
            before, scale = weights(balancer.engine), balancer._adapter.loss_scale
            _step(balancer, joint)
            report = balancer.step()
            assert report.overflow and not report.applied and not report.skipped, (kind, joint, report)
            assert balancer._adapter.loss_scale < scale, (kind, joint)
            assert not largest_change(before, weights(balancer.engine)), (kind, joint)
            broken.clear()
            _step(balancer, joint)
            assert balancer.step().applied, (kind, joint)
            assert largest_change(before, weights(balancer.engine)), (kind, joint)
            finish(balancer)


def _step(balancer: TaskBalancer, joint: bool) -> None:
    if not joint:
        for task in toy.TASKS:
            run_task(balancer, task)
        return
    with balancer.joint(toy.TASKS, at="features"):
        balancer.backward(balancer.engine(toy.TASKS, toy.inputs("det", 0, 0, dist.get_rank()).half()))


def check_a_parameter_of_the_first_micro_step_alone_keeps_its_gradient() -> None:
    """DeepSpeed copies gradients to the optimizer on the CPU in the last backward, of the parameters used in that."""
    for norm in ("exact", "features"):
        results = []
        for kind in (*KINDS, "zero1 fp32 offload"):
            engine = make_engine(kind)
            engine.module.mark = task_features
            balancer = make_balancer(engine, Sum(), norm=norm)
            for step in range(2):
                for task in ("seg", "det"):
                    with balancer.task(task, 2):
                        for k in range(2):
                            x = toy.inputs(task, step, k, dist.get_rank()).float()
                            balancer.backward(engine(task, x, k == 0) * 1e-3)
                balancer.step(require_all=False)
            results.append(weights(engine))
            finish(balancer)
        assert largest_change(toy_weights(), results[0], "late") > 1e-3, norm
        for kind, other in zip((*KINDS, "zero1 fp32 offload"), results, strict=True):
            assert largest_change(results[0], other) < 1e-6, (norm, kind, largest_change(results[0], other))


def toy_weights() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in toy.make_model().named_parameters()}


def check_counts_weigh_the_ranks_of_a_micro_step() -> None:
    """The mean over the labels of all ranks: rank r has 1 + 2 r of them."""
    world = dist.get_world_size()
    numbers = [1 + 2 * rank for rank in range(world)]
    for kind in KINDS[:4]:
        balancer = open_balancer(kind, Sum())
        x = [toy.inputs("det", 0, 0, rank).float()[: 1 + rank] for rank in range(world)]
        model = toy.make_model()
        losses = torch.stack([n * model("det", part.double()) for n, part in zip(numbers, x, strict=True)])
        (losses.sum() / sum(numbers)).backward()
        before = weights(balancer.engine)
        with balancer.task("det"):
            loss = balancer.engine("det", x[dist.get_rank()])
            balancer.backward(loss, count=numbers[dist.get_rank()])
        balancer.step(require_all=False)
        after = weights(balancer.engine)
        for name, p in model.named_parameters():
            if p.grad is not None:
                off = float((before[name] - 0.05 * p.grad - after[name]).abs().max())
                assert off < 1e-6, (kind, name, off)
        finish(balancer)


def check_misuse() -> None:
    for kind in ("zero0 fp32", "zero1 fp32"):
        balancer = open_balancer(kind)
        run_task(balancer, "det")
        balancer.engine.module.zero_grad()
        raises(BalancerError, "gradients of earlier tasks of this step are gone", lambda b=balancer: run_task(b, "seg"))
        balancer.abandon()
        for task in toy.TASKS:
            run_task(balancer, task)
        assert balancer.step().applied
        finish(balancer)
    balancer = open_balancer()
    x = toy.inputs("det", 0, 0, dist.get_rank()).float()

    def block(change=lambda losses: losses, at: str = "features", tasks=toy.TASKS) -> None:
        with balancer.joint(tasks, at=at):
            balancer.backward(change(balancer.engine(tasks, x)))

    raises(ConfigError, "joint(at='backbone') with norm='features'", lambda: block(at="backbone"))
    if dist.get_world_size() > 1:
        missing = {"seg": None} if dist.get_rank() else {}
        raises(BalancerError, "every rank must run every head", lambda: block(lambda losses: {**losses, **missing}))
    balancer.engine.module.mark = lambda features, task: features
    raises(BalancerError, "no features are marked for task 'det'", lambda: run_task(balancer, "det"))
    swapped = {"det": "seg", "seg": "det", "cls": "cls"}
    balancer.engine.module.mark = lambda features, task: task_features(features, swapped[task])
    raises(BalancerError, "reads features that task_features marked for task 'seg'", block)
    raises(BalancerError, "unknown task 'seg'", lambda: run_task(balancer, "det"))
    balancer.engine.module.mark = task_features
    block()
    assert balancer.step().applied, "usable after every error"
    finish(balancer)


def check_refused_options() -> None:
    engine = make_engine()
    for text, options in (
        ("cannot serve TBGC", {"weighting": TBGC(target="mean")}),
        ("They reduce once per step with norm='exact' too", {"parallel": "tasks"}),
        ("groups", {"groups": {"det": 1, "seg": 1, "cls": 1}}),
        ("cosines_every", {"cosines_every": 2}),
        ("sketch_size", {"sketch_size": 16}),
    ):
        raises(ConfigError, text, lambda o=options: make_balancer(engine, norm="features", **o))
    engine.destroy()


def check_the_self_test_serves_it() -> None:
    for kind in ("zero0 fp32", "zero2 fp32", "zero3 fp32"):
        engine = make_engine(kind)
        assert self_test(engine, TaskBalancer, "features") < 1e-4
        engine.destroy()


if __name__ == "__main__":
    join_ranks()
    get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes it on any CPU
    checks = {n.removeprefix("check_"): f for n, f in dict(globals()).items() if n.startswith("check_")}
    run_checks({n: c for n, c in checks.items() if all(w in n for w in sys.argv[2:])}, sys.argv[1])
