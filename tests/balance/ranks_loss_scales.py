"""Checks of settings that multiply a loss or a gradient (see `ranks_balancer.py`)."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime import torch_autocast

from allinone_ds import Sum, TaskBalancer, weighting_from_config
from allinone_ds.balance.self_test import self_test
from allinone_ds.errors import UnsupportedEngine
from allinone_ds.testing.exactness import compare
from allinone_ds.testing.reference import reference_run
from allinone_ds.zero.engines.loss_scale import grad_scaler
from tests.balance.engines import (
    CASES,
    cases,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    raises,
    run_task,
    toy,
    weights,
    whole_master,
)

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "fp16"}}
STAGES = tuple(f"zero{stage} fp32" for stage in range(4))


@contextlib.contextmanager
def autocast():
    """DeepSpeed never resets its autocast, for the engines of later checks."""
    try:
        yield
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def set_scale(engine, scale: float, **state) -> None:
    scaler = grad_scaler(engine)
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, **state})


def difference(
    case: str, config: dict, prepare=None, dtype=torch.float64, weighting: str = "tbgc", norm: str = "exact"
) -> dict:
    """Train 3 steps with 2 micro-steps per task; return the largest differences from the reference."""
    name = cases.WEIGHTINGS[weighting]
    lr = toy.rate(name)
    engine = make_engine(case, lr=lr, **config)
    if prepare is not None:
        prepare(engine)
    balancer = make_balancer(engine, weighting_from_config(name), norm=norm)
    reports = []
    for step in range(3):
        for task in toy.TASKS:
            run_task(balancer, task, step, micro_steps=2)
        reports.append(balancer.step())
    counts = dict.fromkeys(toy.TASKS, 2)
    wanted = reference_run(name, 3, counts, dist.get_world_size(), dtype, lr=lr)
    found = {n: whole_master(engine, p) for n, p in engine.module.named_parameters() if p.requires_grad}
    result = compare(found, reports, wanted, toy.make_model())
    finish(balancer)
    return result


def check_torch_autocast_in_fp16_follows_the_reference() -> None:
    """Norms without the GradScaler's scale, and weights as in float64 within fp16's rounding."""
    prepare = partial(set_scale, scale=8.0)
    with autocast():
        for case in (*STAGES, "zero2 fp32 offload", "zero3 fp32 offload"):
            ways = [("tbgc", "exact", 4e-3)]
            if case == "zero2 fp32":
                ways += [("sum", "exact", 4e-3), ("tbgc mean", "exact", 4e-3), ("tbgc", "sketch", 2e-2)]
            for weighting, norm, limit in ways:
                found = difference(case, AUTOCAST, prepare, weighting=weighting, norm=norm)
                assert found["weights_relative"] < limit, (case, weighting, norm, found)
                assert found["norms"] < limit and found["overflows"] == 0, (case, weighting, norm, found)


def check_torch_autocast_in_bf16_follows_the_reference() -> None:
    bf16 = {"torch_autocast": {"enabled": True, "dtype": "bf16"}}
    with autocast():
        for case in STAGES:
            found = difference(case, bf16)
            assert found["weights_relative"] < 2e-2 and found["norms"] < 2e-2, (case, found)


def check_torch_autocast_trains_as_plain_deepspeed_does() -> None:
    """The plain sum of the tasks, at the scale of 65,536 that torch starts with."""
    with autocast():
        for case in STAGES:
            trained = []
            for balanced in (False, True):
                engine = make_engine(case, lr=0.5, **AUTOCAST)
                before = weights(engine)
                balancer = make_balancer(engine, Sum()) if balanced else None
                for step in range(3):
                    x = inputs(engine, "det", step, 0)
                    if balancer is None:
                        engine.backward(sum(engine("det", x * factor) for factor in (1, 0.5)))
                        engine.step()
                        continue
                    with balancer.task("det", micro_steps=2):
                        for factor in (1, 0.5):
                            balancer.backward(engine("det", x * factor) * 2)
                    balancer.step(require_all=False)
                trained.append(weights(engine))
                engine.destroy() if balancer is None else finish(balancer)
            moved, apart = (largest_change(a, b, "backbone.stem") for a, b in ((before, trained[0]), trained))
            assert moved > 1e-3 and apart < 2e-3 * moved, (case, moved, apart)


def check_an_overflow_under_autocast_skips_the_step_and_lowers_the_scale() -> None:
    with autocast():
        for case in (*STAGES, "zero2 fp32 offload"):
            for norm in ("exact", *(("sketch", "delayed") if case == "zero1 fp32" else ())):
                engine = make_engine(case, "adamw", **AUTOCAST)
                balancer = make_balancer(engine, norm=norm)
                before, skipped = weights(engine), 0
                for step in range(12):  # the loss of "seg" is 3,000 times too large for a scale of 65,536
                    for task in toy.TASKS:
                        run_task(balancer, task, step)
                    report = balancer.step()
                    assert not report.skipped, (case, norm, report.skipped)
                    if report.applied:
                        break
                    skipped += 1
                    assert report.overflow and largest_change(before, weights(engine)) == 0.0, (case, norm)
                    assert grad_scaler(engine).get_scale() == 2.0 ** (16 - skipped), (case, norm, skipped)
                assert 1 <= skipped < 12 and report.applied and not report.overflow, (case, norm, skipped)
                for task in ("heads.det", "heads.seg", "backbone.stem"):
                    assert largest_change(before, weights(engine), task) > 0, (case, norm, task)
                finish(balancer)


def check_a_scale_that_grows_does_not_change_the_step_in_which_it_grows() -> None:
    """5 parameter groups, and a scale that grows after 3 updates: DeepSpeed updates it after each group."""
    with autocast():
        for case in STAGES:
            prepare = partial(set_scale, scale=2.0, growth_interval=3, _growth_tracker=0)
            found = difference(case, AUTOCAST, prepare)
            assert found["weights_relative"] < 4e-3 and found["norms"] < 4e-3, (case, found)


def check_loss_scales_of_every_route_are_not_in_the_norms() -> None:
    """Static scales of the fp16 section, and scales that the user sets, in every type."""
    static = {"fp16": {"enabled": True, "loss_scale": 16.0}}
    for stage in range(4):
        found = difference(f"zero{stage} fp16", static, dtype=torch.float16)
        assert found["norms"] < 2e-3 and found["weights_relative"] < 2e-3, (stage, found)
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero2 fp16", "zero3 bf16"):
        dtype = {"fp32": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}[case.split()[1]]
        found = difference(case, {}, lambda engine: engine.optimizer.override_loss_scale(32.0), dtype)
        limit = {torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert found["norms"] < limit and found["weights_relative"] < limit, (case, found)


def check_an_overflow_with_a_static_scale_skips_the_step_and_keeps_the_scale() -> None:
    for stage in range(4):
        engine = make_engine(f"zero{stage} fp16", fp16={"enabled": True, "loss_scale": 16.0})
        balancer = make_balancer(engine)
        before = weights(engine)
        for task in toy.TASKS:
            run_task(balancer, task, factor=1e4 if task == "seg" else 1.0)
        report = balancer.step()
        assert report.overflow and not report.applied and not report.skipped, (stage, report)
        assert largest_change(before, weights(engine)) == 0.0 and balancer._adapter.loss_scale == 16.0
        for task in toy.TASKS:
            run_task(balancer, task)
        assert balancer.step().applied and largest_change(before, weights(engine)) > 0, stage
        finish(balancer)


PLAIN = {"gradient_accumulation_steps": 4, "communication_data_type": "fp32", "dump_state": True}
"""Settings that every stage allows."""


def without_reduce_scatter(stage: int) -> dict:
    return {"zero_optimization": {**CASES[f"zero{stage} fp32"].config()["zero_optimization"], "reduce_scatter": False}}


def check_settings_that_multiply_gradients_are_exact() -> None:
    stage0 = {"prescale_gradients": True, "gradient_predivide_factor": 4.0}, {"gradient_predivide_factor": 2.0}
    cases_of_stage = [(stage, PLAIN) for stage in range(4)] + [(0, config) for config in stage0]
    for stage, config in cases_of_stage:
        found = difference(f"zero{stage} fp32", config)
        assert found["weights"] < 1e-6 and found["norms"] < 1e-5, (stage, config, found)
    for stage in (1, 2, 3):  # DeepSpeed allows both with reduce_scatter off only
        for config in ({"prescale_gradients": True}, {"gradient_predivide_factor": 2.0})[: 1 if stage == 3 else 2]:
            found = difference(f"zero{stage} fp32", {**without_reduce_scatter(stage), **config})
            assert found["weights"] < 1e-6 and found["norms"] < 1e-5, (config, stage, found)
    for stage in (1, 2, 3):
        found = difference(f"zero{stage} fp32", {"communication_data_type": "fp16"})
        assert found["norms"] < 2e-3 and found["weights_relative"] < 2e-3, ("fp16 communication", stage, found)


def check_scales_that_cannot_be_measured_are_refused() -> None:
    for stage in range(3):  # DeepSpeed refuses it on ZeRO-3
        engine = make_engine(f"zero{stage} fp32", gradient_allreduce_op="sum")
        raises(UnsupportedEngine, "multiply the loss by the number of ranks", partial(make_balancer, engine))
        engine.destroy()
    engine = make_engine("zero3 fp32", gradient_predivide_factor=2.0, **without_reduce_scatter(3))
    raises(UnsupportedEngine, "gradient_predivide_factor on ZeRO-3", partial(make_balancer, engine))
    engine.destroy()
    zero = {"stage": 2, "compute_grad_norm": False}
    with autocast():
        engine = make_engine("zero2 fp32", zero_optimization=zero, **AUTOCAST)
        raises(UnsupportedEngine, "compute_grad_norm = false", partial(make_balancer, engine))
        engine.destroy()
        engine = make_engine("zero2 fp32", **AUTOCAST)
        engine.optimizer.override_loss_scale(2.0)
        raises(UnsupportedEngine, "override_loss_scale", partial(make_balancer, engine))
        engine.destroy()
        engine = make_engine("zero2 fp16", **AUTOCAST)
        raises(UnsupportedEngine, "beside the fp16 section", partial(make_balancer, engine))
        engine.destroy()


def check_self_test_passes_under_autocast() -> None:
    with autocast():
        for case in ("zero0 fp32", "zero2 fp32"):
            engine = make_engine(case, **AUTOCAST)
            assert self_test(engine, TaskBalancer) < 0.05, case
            engine.destroy()
