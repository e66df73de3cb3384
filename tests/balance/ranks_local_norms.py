"""Checks of norms from sketches and from the previous step, and of parameter traces (see `ranks_balancer.py`)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from allinone_ds import DWA, TBGC, GlobalClip, Sum, TaskClip, Uncertainty
from allinone_ds.errors import BalancerError, UnsupportedEngine
from allinone_ds.testing.reference import factors, gradients, norm_of
from allinone_ds.zero.params import whole_master
from tests.balance.engines import (
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

KINDS = tuple(kind for kind in FP32_KINDS if kind != "zero0 fp32")
SIXTEEN_BIT = ("zero1 bf16", "zero2 bf16", "zero2 bf16 fp32-accumulation", "zero3 bf16", "zero3 bf16 fp32-accumulation",
               "zero2 bf16 offload", "zero2 bf16 fp32-accumulation offload", "zero3 fp16")  # fmt: skip
VARIANTS = ("zero1 fp32 overlap=1 contiguous=0", "zero2 fp32 overlap=1 contiguous=1", "zero2 fp32 round robin",
            "zero3 fp32 sub-groups", "zero2 fp32 one param group", "zero3 fp32 checkpointing")  # fmt: skip
WEIGHTINGS = {
    "tbgc": (TBGC(0.1), {"name": "tbgc"}),
    "sum": (Sum(), {"name": "sum"}),
    "global_clip": (GlobalClip(0.1), {"name": "global_clip", "max_norm": 0.1}),
    "task_clip": (TaskClip(0.1), {"name": "task_clip"}),
    "heads none": (TBGC(0.1, heads="none"), {"name": "tbgc", "heads": "none"}),
    "mean": (TBGC(target="mean"), {"name": "tbgc", "target": "mean"}),
}
MICRO_STEPS = {"det": 1, "seg": 2, "cls": 4}
SKETCH = 4096


def follow(case: str, name: str, norm: str) -> None:
    """Three SGD steps beside a float64 model that is moved by the factors the balancer reports.

    Weights must agree to rounding, so each task's whole gradient got its factor, once; norms must be near the true
    ones; and the factors must be what the weighting's formula makes of the norms: this step's, or the last one's.
    """
    weighting, config = WEIGHTINGS[name]
    lr = toy.rate(config)
    engine = make_engine(case, lr=lr)
    balancer = make_balancer(engine, weighting, norm=norm, sketch_size=SKETCH)
    dtype = next(engine.module.parameters()).dtype
    model = toy.make_model().to(dtype)
    master = {n: p.detach().double() for n, p in model.named_parameters()}
    start = dict(master)
    low = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    last: dict[str, dict[str, float]] = {}
    for step in range(3):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(master[n])
        found = {t: gradients(model, t, step, MICRO_STEPS[t], dist.get_world_size()) for t in toy.TASKS}
        for task in toy.TASKS:
            run_task(balancer, task, step, MICRO_STEPS[task])
        report = balancer.step()
        norms = {t: norm_of(v for n, v in g.items() if n.startswith("backbone.")) for t, g in found.items()}
        error = report.norm_error or 1e-5
        for task in toy.TASKS:
            off = abs(float(report.norms[task]) / norms[task] - 1)
            assert off <= 5 * error + low, (case, name, norm, step, task, off)
        seen = {"norms": _floats(report.norms), "whole": _floats(report.whole_norms)}
        used = last if norm == "delayed" and step else seen
        if config["name"] != "global_clip":
            for task, wanted in factors(config, used["norms"], used["whole"]).items():
                assert abs(float(report.scales[task]) / wanted - 1) < 1e-4, (case, name, norm, step, task)
        last = seen
        for task, gradient in found.items():
            for n, value in gradient.items():
                raw = config.get("heads") == "none" and not n.startswith("backbone.")
                master[n] = master[n] - lr * value * (1.0 if raw else float(report.scales[task]))
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    off = max(float((whole_master(engine, p) - master[n]).abs().max()) for n, p in trained.items())
    off /= largest_change(start, master)
    assert off <= max(low, 2e-5), (case, name, norm, off)
    finish(balancer)


def _floats(values: dict) -> dict[str, float]:
    return {task: float(value) for task, value in values.items()}


def check_weights_follow_the_reported_factors(kinds=(*KINDS, *SIXTEEN_BIT, *VARIANTS)) -> None:
    for case in kinds:
        for norm in ("sketch", "delayed"):
            follow(case, "tbgc", norm)


def check_every_weighting_from_sketches() -> None:
    for case in ("zero2 fp32", "zero3 fp32 offload"):
        for name, (weighting, _) in WEIGHTINGS.items():
            follow(case, name, "delayed")
            if weighting.streams:
                follow(case, name, "sketch")


def check_the_first_delayed_step_is_exact() -> None:
    """And one after a partial step, unless each task's factor is its own: then absent tasks have their last one."""
    for name in ("tbgc", "mean"):
        last: dict[str, float] = {}
        engine = make_engine("zero2 fp32")
        balancer = make_balancer(engine, WEIGHTINGS[name][0], norm="delayed", sketch_size=SKETCH)
        for step, tasks, exact in ((0, toy.TASKS, True), (1, toy.TASKS, False), (2, ("det",), False),
                                   (3, toy.TASKS, True), (4, toy.TASKS, False)):  # fmt: skip
            for task in tasks:
                run_task(balancer, task, step)
            report = balancer.step(require_all=False)
            own = name == "tbgc"
            assert (report.norm_error == 0.0) == (exact and not (own and step)), (name, step, report.norm_error)
            for task in tasks if own and step else ():
                assert abs(float(report.scales[task]) / min(1.0, 0.1 / (last[task] + 1e-6)) - 1) < 1e-4, (step, task)
            last |= _floats(report.norms)
        finish(balancer)


def check_delayed_steps_are_exact_until_every_task_has_run() -> None:
    """Of sampled tasks; the factors survive a checkpoint, and a step that was given up leaves none."""
    engine = make_engine("zero2 fp32")
    balancer = make_balancer(engine, TBGC(0.1), norm="delayed", sketch_size=SKETCH)
    exact = []
    for step, tasks in enumerate((("det",), ("seg",), ("det",), ("cls",), ("seg",), ("det", "cls"))):
        balancer.load_state_dict(balancer.state_dict())
        for task in tasks:
            run_task(balancer, task, step)
        exact.append(balancer.step(require_all=False).norm_error == 0.0)
    assert exact == [True, True, True, True, False, False]
    finish(balancer)


def check_local_norms_are_the_same_on_all_ranks() -> None:
    for norm in ("sketch", "delayed"):
        balancer = make_balancer(make_engine("zero2 fp32"), norm=norm, sketch_size=64)
        for step in range(2):
            for task in toy.TASKS:
                run_task(balancer, task, step)
            report = balancer.step()
        mine = torch.stack([report.norms[t] for t in toy.TASKS] + [report.scales[t] for t in toy.TASKS])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)
        finish(balancer)


def check_local_modes_leave_out_what_is_not_finite() -> None:
    """sketch: the task alone. delayed: the whole step, since its tasks share one gradient. Both train on."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for case in KINDS:
        for norm in ("sketch", "delayed"):
            engine = make_engine(case, "adamw")
            balancer = make_balancer(engine, norm=norm, sketch_size=SKETCH)
            for step in range(2):
                for task in toy.TASKS:
                    run_task(balancer, task, step)
                balancer.step()
            before = weights(engine)
            for task in toy.TASKS:
                run_task(balancer, task, 2, factor=float("inf") if task == "seg" and last else 1.0)
            report = balancer.step()
            after = weights(engine)
            assert report.skipped == ("seg",) and not report.overflow, (case, norm)
            assert report.applied == (norm == "sketch"), (case, norm)
            assert largest_change(before, after, "heads.seg") == 0.0, (case, norm)
            assert (largest_change(before, after, "heads.det") > 0) == (norm == "sketch"), (case, norm)
            for task in toy.TASKS:
                run_task(balancer, task, 3)
            assert balancer.step().applied and largest_change(after, weights(engine), "heads.seg") > 0
            assert all(bool(torch.isfinite(v).all()) for v in weights(engine).values()), (case, norm)
            finish(balancer)


def check_local_modes_keep_absent_heads_still() -> None:
    for case in KINDS:
        for norm in ("sketch", "delayed"):
            engine = make_engine(case, "momentum")
            balancer = make_balancer(engine, norm=norm, sketch_size=SKETCH)
            for step in range(2):
                for task in toy.TASKS:
                    run_task(balancer, task, step)
                balancer.step()
            before = weights(engine)
            run_task(balancer, "det", 2)
            balancer.step(require_all=False)
            after = weights(engine)
            assert largest_change(before, after, "heads.seg") == 0.0 == largest_change(before, after, "late"), (
                case,
                norm,
            )
            assert largest_change(before, after, "heads.det") > 0, (case, norm)
            finish(balancer)


def check_cosines_are_those_of_the_gradients() -> None:
    """Exact where T shards are kept, else from sketches; in each second step, and None in between."""
    found = {t: gradients(toy.make_model(), t, 0, 1, dist.get_world_size()) for t in toy.TASKS}
    flat = {t: torch.cat([v.reshape(-1) for n, v in g.items() if n.startswith("backbone.")]) for t, g in found.items()}
    runs = [(case, TBGC(0.1), norm) for case in KINDS for norm in ("exact", "sketch", "delayed")]
    for case, weighting, norm in [
        *runs,
        ("zero0 fp32", TBGC(0.1), "exact"),
        ("zero2 fp32", TBGC(target="mean"), "exact"),
    ]:
        engine = make_engine(case, lr=0.0)
        balancer = make_balancer(engine, weighting, norm=norm, cosines_every=2)
        for step in range(3):
            for task in toy.TASKS:
                run_task(balancer, task)
            report = balancer.step()
            if step == 1:
                assert report.gram is None
                raises(ValueError, "cosines_every", report.cosines)
                continue
            cosines = report.cosines()
            assert len(cosines) == 3
            for (a, b), got in cosines.items():
                wanted = float(flat[a] @ flat[b] / flat[a].norm() / flat[b].norm())
                assert abs(got - wanted) < 0.02, (case, norm, a, b, got, wanted)
            assert report.conflict_rate() == sum(v < 0 for v in cosines.values()) / 3
        finish(balancer)


def check_fp16_overflow_in_local_modes() -> None:
    for case in ("zero1 fp16", "zero2 fp16", "zero3 fp16"):
        for norm in ("sketch", "delayed"):
            fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1}
            engine = make_engine(case, fp16=fp16)
            balancer = make_balancer(engine, norm=norm, sketch_size=SKETCH)
            for task in toy.TASKS:
                run_task(balancer, task)
            assert balancer.step().applied, (case, norm)
            before, scale = weights(engine), balancer._adapter.loss_scale
            for task in toy.TASKS:
                run_task(balancer, task, factor=3e4 if task == "seg" else 1.0)
            report = balancer.step()
            assert report.overflow and not report.applied, (case, norm)
            assert largest_change(before, weights(engine)) == 0.0, (case, norm)
            assert balancer._adapter.loss_scale == scale / 2, (case, norm)
            for task in toy.TASKS:
                run_task(balancer, task)
            assert balancer.step().applied and largest_change(before, weights(engine)) > 0, (case, norm)
            finish(balancer)


def check_errors_in_local_modes_leave_the_step_usable() -> None:
    """After an error in a task the step continues (delayed: restarts) and equals that of an undisturbed run."""
    for case in KINDS:
        for norm in ("sketch", "delayed"):
            moved = []
            for disturbed in (False, True):
                engine = make_engine(case)
                balancer = make_balancer(engine, norm=norm, sketch_size=SKETCH)
                for task in toy.TASKS:
                    run_task(balancer, task)
                balancer.step()
                run_task(balancer, "det", 1)
                if disturbed:
                    raises(KeyError, "a loader's error", lambda: _break(balancer))  # noqa: B023
                    if norm == "delayed":
                        run_task(balancer, "det", 1)
                for task in ("seg", "cls"):
                    run_task(balancer, task, 1)
                assert balancer.step().applied
                moved.append(weights(engine))
                finish(balancer)
            assert largest_change(*moved) < 1e-7, (case, norm)


def _break(balancer) -> None:
    with balancer.task("seg", 2):
        balancer.backward(balancer.engine("seg", inputs(balancer.engine, "seg", 9, 9), True))
        raise KeyError("a loader's error")


def check_training_continues_from_a_saved_state() -> None:
    """A balancer that takes over another's state in the middle of a run gives the same weights, bit for bit."""
    for norm, weighting in (("delayed", DWA), ("sketch", Uncertainty), ("exact", DWA)):
        moved = []
        for cut in (False, True):
            engine = make_engine("zero2 fp32", lr=1e-4)
            balancer = make_balancer(engine, weighting(), norm=norm, **({} if norm == "exact" else {"sketch_size": 64}))
            for step in range(4):
                if cut and step == 2:
                    state = balancer.state_dict()
                    balancer.detach()
                    options = {} if norm == "exact" else {"sketch_size": 64}
                    balancer = make_balancer(engine, weighting(), norm=norm, **options)
                    balancer.load_state_dict(state)
                for task in toy.TASKS:
                    run_task(balancer, task, step)
                balancer.step()
            moved.append(weights(engine))
            finish(balancer)
        assert largest_change(*moved) == 0.0, norm


def check_norm_options_are_checked() -> None:
    engine = make_engine("zero2 fp32")
    raises(ValueError, "did you mean 'sketch'", lambda: make_balancer(engine, norm="sketches"))
    raises(ValueError, "sketch_size = 0", lambda: make_balancer(engine, norm="sketch", sketch_size=0))
    raises(ValueError, "sketch_size = 64 with norm = 'exact'", lambda: make_balancer(engine, sketch_size=64))
    raises(ValueError, "use norm='delayed'", lambda: make_balancer(engine, TBGC(target="mean"), norm="sketch"))
    balancer = make_balancer(engine, norm="sketch")
    raises(BalancerError, "engine.step() was called", engine.step)
    finish(balancer)
    for case in ("zero0 fp32", "zero1 bf16 fp32-accumulation"):
        engine = make_engine(case)
        raises(UnsupportedEngine, "norm='exact'", lambda: make_balancer(engine, norm="delayed"))  # noqa: B023
        engine.destroy()
