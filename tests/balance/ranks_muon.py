"""Checks of DeepSpeed's Muon on balanced gradients (see `ranks_balancer.py`); its exactness is in the cases there."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from allinone_ds import Sum, TaskBalancer
from allinone_ds.errors import UnsupportedEngine
from allinone_ds.testing.exactness import compare
from allinone_ds.testing.exactness import train as train_toy
from allinone_ds.testing.muon import MuonByHand, muon, newton_schulz_in_float32
from allinone_ds.testing.reference import reference_run
from allinone_ds.zero.checkpoint.write import save_engine
from allinone_ds.zero.engine_like import whole_weights
from allinone_ds.zero.engines.muon import MOMENTUM
from tests.balance.engines import (
    CASES,
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

FP32 = tuple(f"zero{stage} fp32 muon" for stage in range(4))
SECTION = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 0.002, "momentum": 0.9, "weight_decay": 0.1}}


def configured(case: str):
    """An engine with Muon from the section `optimizer` of the config: DeepSpeed takes every matrix, heads included."""
    model = toy.make_model().float()
    groups = toy.param_groups(model)
    config = {**CASES[case].config(), "optimizer": SECTION}
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def momenta(engine) -> list[torch.Tensor]:
    states = engine.optimizer.optimizer.state.values()
    return [state[MOMENTUM].clone() for state in states if MOMENTUM in state]


def step(balancer: TaskBalancer, number: int = 0, **factors: float):
    for task in toy.TASKS:
        run_task(balancer, task, number, factor=factors.get(task, 1.0))
    return balancer.step()


def check_muon_on_one_task_trains_as_plain_deepspeed_does() -> None:
    """The section `optimizer` of the config; two micro-steps, so that an update per micro-step would differ."""
    with newton_schulz_in_float32():
        for case in (*FP32, "zero1 bf16 fp32-accumulation muon"):
            trained = []
            for balanced in (False, True):
                engine = configured(case)
                before = weights(engine)
                balancer = make_balancer(engine, Sum()) if balanced else None
                for number in range(3):
                    x = inputs(engine, "det", number, 0)
                    if balancer is None:
                        engine.backward(engine("det", x))
                        engine.step()
                        continue
                    with balancer.task("det", micro_steps=2):
                        for factor in (1.0, 1.0) if "16" in case else (0.5, 1.5):  # the halves round differently
                            balancer.backward(engine("det", x) * factor)
                    balancer.step(require_all=False)
                trained.append(weights(engine))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    engine.destroy() if balancer is None else finish(balancer)
            limit = 1e-2 if "16" in case else 1e-5
            moved, apart = (largest_change(a, b, "backbone.blocks") for a, b in ((before, trained[0]), trained))
            assert moved > 1e-2 and apart < limit * moved, (case, moved, apart)


def check_muon_with_sketched_and_delayed_norms_follows_the_reference() -> None:
    """A model so small that its sketch is exact."""
    counts = dict.fromkeys(toy.TASKS, 2)
    with newton_schulz_in_float32():
        for norm in ("sketch", "delayed"):
            for stage in (1, 2, 3):
                model, before, reference = (toy.make_model(width=4, depth=1) for _ in range(3))
                model = model.float()
                config = CASES[f"zero{stage} fp32 muon"].config()
                engine = deepspeed.initialize(model=model, optimizer=muon(model), config=config)[0]
                balancer = make_balancer(engine, norm=norm)
                reports = train_toy(engine, balancer, counts, 3)
                wanted = reference_run(
                    {"name": "tbgc", "max_norm": 0.1}, 3, counts, dist.get_world_size(), model=reference,
                    delayed=norm == "delayed", optimizer=MuonByHand(),
                )  # fmt: skip
                found = compare(whole_weights(engine), reports, wanted, before)
                assert found["weights_relative"] < 1e-4 and found["norms"] < 1e-4, (norm, stage, found)
                finish(balancer)


def check_muon_leaves_heads_of_absent_and_skipped_tasks_alone() -> None:
    """Their matrices are Muon's here, and stay with their momentum."""
    for case in FP32:
        engine = configured(case)
        balancer = make_balancer(engine)
        step(balancer)
        before = weights(engine)
        for task, factor in (("det", 1.0), ("cls", float("nan"))):
            run_task(balancer, task, 1, factor=factor)
        assert balancer.step(require_all=False).skipped == ("cls",)
        after = weights(engine)
        for still in ("heads.seg", "heads.cls", "late"):
            assert largest_change(before, after, still) == 0.0, (case, still)
        assert largest_change(before, after, "heads.det") > 0 and largest_change(before, after, "backbone.stem") > 0
        assert all(bool(torch.isfinite(value).all()) for value in after.values()), case
        step(balancer, 2)
        assert largest_change(after, weights(engine), "heads.seg") > 0, case
        finish(balancer)


def check_muon_leaves_frozen_parameters_alone() -> None:
    """DeepSpeed's Muon steps on a parameter without a gradient too, with decay and momentum."""
    for case in FP32:
        engine = make_engine(case)
        balancer = make_balancer(engine)
        step(balancer)
        backbone = [
            p for name, p in engine.module.named_parameters() if name.startswith("backbone.") and p.requires_grad
        ]
        before = weights(engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for param in backbone:
                param.requires_grad_(False)
            step(balancer, 1)
            after = weights(engine)
            assert largest_change(before, after, "backbone.") == 0.0, case
            assert largest_change(before, after, "heads.") > 0, case
            for param in backbone:
                param.requires_grad_(True)
            step(balancer, 2)
        assert largest_change(after, weights(engine), "backbone.blocks") > 0, case
        finish(balancer)


def check_an_overflow_leaves_the_momentum_of_muon_alone() -> None:
    for stage in (1, 2, 3):
        fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1}
        engine = make_engine(f"zero{stage} fp16 muon", fp16=fp16)
        balancer = make_balancer(engine)
        assert step(balancer, seg=1e-3).applied
        before, kept = weights(engine), momenta(engine)
        report = step(balancer, 1, seg=3e4)
        assert report.overflow and not report.applied, stage
        assert largest_change(before, weights(engine)) == 0.0
        assert all(torch.equal(a, b) for a, b in zip(kept, momenta(engine), strict=True)), stage
        assert step(balancer, 2, seg=1e-3).applied and largest_change(before, weights(engine)) > 0
        assert not all(torch.equal(a, b) for a, b in zip(kept, momenta(engine), strict=True)), stage
        finish(balancer)


def check_a_resume_of_muon_continues_bit_for_bit() -> None:
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    for case in (*FP32[1:], "zero1 bf16 fp32-accumulation muon", "zero2 bf16 muon"):
        folder = Path(folders[0]) / case
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        trained = []
        for resumed in (False, True):
            engine = make_engine(case)
            if resumed:
                engine.load_checkpoint(str(folder))
            balancer = make_balancer(engine)
            for number in range(2 if resumed else 0, 4):
                step(balancer, number)
                if number == 1:
                    assert save_engine(engine, folder) == []
            trained.append(weights(engine))
            finish(balancer)
        assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items()), case


def check_the_norm_of_a_step_of_muon_is_that_of_the_gradient() -> None:
    """DeepSpeed's own would be that of the orthogonal update, some 5 for any gradient."""
    for case in (*FP32[1:], "zero1 bf16 fp32-accumulation muon"):
        engine = make_engine(case)
        balancer = make_balancer(engine)
        report = step(balancer)
        assert float(engine.get_global_grad_norm()) < 0.5, (case, engine.get_global_grad_norm(), report.norms)
        finish(balancer)


def check_what_muon_cannot_do_is_refused() -> None:
    engine = make_engine("zero2 fp32 muon", gradient_clipping=1.0)
    raises(UnsupportedEngine, "gradient_clipping", partial(make_balancer, engine, allow_gradient_clipping=True))
    engine.destroy()
    model = toy.make_model().float()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "use_muon": True}]
    from allinone_ds.zero.engines.muon import make_muon

    for stage in (0, 1, 3):
        config = CASES[f"zero{stage} fp32 muon"].config()
        optimizer = make_muon(groups, 0.9, "gram", (0.9, 0.95), 1e-8)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        raises(UnsupportedEngine, "no matrices (backbone.", partial(make_balancer, engine))
        engine.destroy()
        model = toy.make_model().float()
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "use_muon": True}]
    engine = make_engine("zero0 bf16", "muon")
    raises(UnsupportedEngine, "Muon in 16 bit on ZeRO-0", partial(make_balancer, engine))
    engine.destroy()
    zero = {**CASES["zero2 fp32 muon"].config()["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    engine = make_engine("zero2 fp32 muon", zero_optimization=zero)
    raises(UnsupportedEngine, "Muon with the optimizer on the CPU", partial(make_balancer, engine))
    engine.destroy()


def check_detach_gives_muon_back_and_says_what_is_lost() -> None:
    engine = configured("zero2 fp32 muon")
    tagged = [name for name, param in engine.module.named_parameters() if param.use_muon]
    balancer = make_balancer(engine)
    raises(Exception, "already has a TaskBalancer", partial(make_balancer, engine))
    assert not any(param.use_muon for param in engine.module.parameters()), "still taken over"
    step(balancer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        balancer.detach()
    assert any("momentum of zero" in str(warning.message) for warning in caught)
    assert tagged and [name for name, param in engine.module.named_parameters() if param.use_muon] == tagged
    engine.destroy()
