"""Checks of tasks on different ranks, parallel="tasks" (see `ranks_balancer.py`)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from allinone_ds import DWA, TBGC, Sum, TaskBalancer
from allinone_ds.balance.combiners import task_parallel as parallel
from allinone_ds.balance.self_test import self_test
from allinone_ds.errors import BalancerError, NonFinite, UnsupportedEngine
from allinone_ds.testing.reference import gradients, reference_run
from tests.balance.engines import (
    cases,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    raises,
    run_case,
    toy,
    weights,
)

KINDS = ("zero1 fp32", "zero2 fp32", "zero2 fp32 offload")
MICRO_STEPS = {"det": 1, "seg": 2, "cls": 4}


def make_apart(engine, weighting=None, **options) -> TaskBalancer:
    groups = cases.GROUPS[dist.get_world_size()][0]
    return make_balancer(engine, weighting, parallel="tasks", **{"groups": groups, **options})


def run_own(balancer: TaskBalancer, step: int = 0, factors: dict | None = None, tasks=toy.TASKS) -> None:
    """This rank's micro-batches of this rank's tasks; losses times `factors` on the last rank that runs the task."""
    for task in balancer.tasks:
        if task not in tasks:
            continue
        last = balancer.groups.ranks[task][-1] == dist.get_rank()
        factor = (factors or {}).get(task, 1.0) if last else 1.0
        mine = balancer.share(task, MICRO_STEPS[task])
        with balancer.task(task, len(mine)):
            for k, rank in mine:
                loss = balancer.engine(task, inputs(balancer.engine, task, step, k, rank), k == MICRO_STEPS[task] - 1)
                balancer.backward(loss * factor)


def check_apart_is_the_sequential_mode() -> None:
    """Same samples, same engines: weights, norms and factors of both modes, with AdamW and weights of the Gram kind."""
    for case in KINDS:
        for weighting, norm in ((TBGC(0.1), "exact"), (TBGC(0.1), "sketch"), (TBGC(target="mean"), "sketch")):
            found, reports = [], []
            for apart in (False, True):
                engine = make_engine(case, "adamw")
                balancer = make_apart(engine, weighting, norm=norm) if apart else make_balancer(engine, weighting)
                for step in range(3):
                    run_own(balancer, step)
                    reports.append(balancer.step())
                found.append(weights(engine))
                finish(balancer)
            assert largest_change(*found) < 1e-5, (case, weighting, norm)
            for one, other in zip(reports[:3], reports[3:], strict=True):
                assert one.tasks == other.tasks and other.applied
                for field in ("norms", "whole_norms", "scales", "losses"):
                    for task in toy.TASKS:
                        a, b = float(getattr(one, field)[task]), float(getattr(other, field)[task])
                        assert abs(a / b - 1) < 1e-4, (case, weighting, norm, field, task, a, b)


def check_apart_in_small_buckets() -> None:
    """A group's gradient that is measured in many pieces, some of them shorter than the group."""
    before, parallel.BUCKET = parallel.BUCKET, 10
    try:
        result = run_case(cases.Case("buckets", 2, apart=True), {"name": "task_clip", "max_norm": 0.1}, (1, 2, 4))
    finally:
        parallel.BUCKET = before
    assert max(result["weights"], result["norms"], result["scales"]) < 1e-5, result


def check_apart_reports_are_equal_on_all_ranks() -> None:
    for norm in ("exact", "sketch"):
        balancer = make_apart(make_engine(), norm=norm, sketch_size=None if norm == "exact" else 64, cosines_every=1)
        run_own(balancer)
        report = balancer.step()
        values = [report.norms, report.scales, report.losses, report.whole_norms]
        mine = torch.cat([torch.stack([v[t] for v in values for t in toy.TASKS]).double(), report.gram.reshape(-1)])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), norm
        assert (report.norm_error == 0.0) == (norm == "exact")
        finish(balancer)


def check_apart_cosines_and_gram_weightings() -> None:
    """The Gram matrix has measured norms and sketched cosines; a weighting that reads it gets those of tasks in use."""
    found = {t: gradients(toy.make_model(), t, 0, MICRO_STEPS[t], dist.get_world_size()) for t in toy.TASKS}
    rows = [torch.cat([v.reshape(-1) for n, v in found[t].items() if n.startswith("backbone.")]) for t in toy.TASKS]
    wanted = torch.stack(rows) @ torch.stack(rows).T
    norms = wanted.diagonal().sqrt()
    seen: list[torch.Tensor] = []

    def weigh(gram: torch.Tensor) -> torch.Tensor:
        seen.append(gram)
        return gram.diagonal().rsqrt()

    for norm in ("exact", "sketch"):
        balancer = make_apart(make_engine(lr=0.0), weigh, norm=norm, cosines_every=1)
        run_own(balancer)
        report = balancer.step()
        for gram in (report.gram, seen[-1]):
            off = (gram - wanted) / norms[:, None] / norms[None, :]
            assert float(off.abs().max()) < 0.02 and (norm == "sketch" or float(off.diagonal().abs().max()) < 1e-5)
        assert abs(float(report.scales["seg"]) * float(norms[1]) - 1) < 0.02
        run_own(balancer, factors={"seg": float("nan")})
        assert balancer.step().skipped == ("seg",) and seen[-1].shape == (2, 2)
        finish(balancer)


def check_apart_leaves_out_what_is_not_finite() -> None:
    for case in (*KINDS, "zero2 bf16"):
        for policy in ("skip_task", "skip_step", "stop"):
            engine = make_engine(case, "adamw")
            balancer = make_apart(engine, nonfinite=policy)
            run_own(balancer)
            balancer.step()
            before = weights(engine)
            run_own(balancer, 1, {"seg": float("inf")})
            if policy == "stop":
                raises(NonFinite, "seg", balancer.step)
            else:
                report = balancer.step()
                assert report.skipped == ("seg",) and float(report.scales["seg"]) == 0.0 and not report.overflow
                assert report.applied == (policy == "skip_task"), (case, policy)
                assert balancer.skipped_steps == {"det": 0, "seg": 1, "cls": 0}
            after = weights(engine)
            assert largest_change(before, after, "heads.seg") == 0.0, (case, policy)
            moved = largest_change(before, after, "heads.det"), largest_change(before, after, "backbone.stem")
            assert all((change > 0) == (policy == "skip_task") for change in moved), (case, policy)
            run_own(balancer, 2)
            assert balancer.step().applied and largest_change(after, weights(engine), "heads.seg") > 0
            assert all(bool(torch.isfinite(v).all()) for v in weights(engine).values())
            finish(balancer)


def check_apart_fp16_overflow_follows_the_loss_scaler() -> None:
    for case in ("zero1 fp16", "zero2 fp16"):
        engine = make_engine(case, fp16={"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1})
        balancer = make_apart(engine)
        before, scale = weights(engine), balancer._adapter.loss_scale
        run_own(balancer, 0, {"seg": 3e4})
        report = balancer.step()
        assert report.overflow and not report.skipped and not report.applied, case
        assert largest_change(before, weights(engine)) == 0.0 and balancer._adapter.loss_scale == scale / 2, case
        run_own(balancer)
        assert balancer.step().applied and largest_change(before, weights(engine), "heads.seg") > 0, case
        finish(balancer)


def check_apart_partial_steps_equal_the_sequential_mode() -> None:
    """Over full and partial steps: heads of absent tasks stand still, momentum and decay included."""
    steps = (toy.TASKS, ("det",), ("seg", "cls"), toy.TASKS)
    for case in KINDS:
        found = []
        for apart in (False, True):
            engine = make_engine(case, "adamw")
            balancer = make_apart(engine) if apart else make_balancer(engine)
            for step, tasks in enumerate(steps):
                before = weights(engine)
                run_own(balancer, step, tasks=tasks)
                report = balancer.step(require_all=False)
                assert set(report.norms) == set(tasks)
                for head in (f"heads.{task}" for task in toy.TASKS if task not in tasks):
                    assert largest_change(before, weights(engine), head) == 0.0, (case, head)
            found.append(weights(engine))
            finish(balancer)
        assert largest_change(*found) < 1e-5, case


def check_apart_misuse_is_an_error_on_all_ranks() -> None:
    engine = make_engine()
    balancer = make_apart(engine)
    before, rank = weights(engine), dist.get_rank()
    other = next((task for task in toy.TASKS if task not in balancer.tasks), None)
    if other:
        text = f"runs on rank(s) {list(balancer.groups.ranks[other])}, this is rank {rank}"
        raises(BalancerError, text, lambda: balancer.task(other).__enter__())
    raises(BalancerError, "before task(s) det, seg, cls ran (ran: none)", lambda: balancer.step(require_all=False))
    run_own(balancer, tasks=("det", "cls"))
    raises(BalancerError, "before task(s) seg ran (ran: det, cls)", balancer.step)
    run_own(balancer, tasks=("seg",))
    if balancer.tasks:
        raises(BalancerError, "a second time", lambda: balancer.task(balancer.tasks[0]).__enter__())
    raises(BalancerError, "regroup() in the middle of a step", lambda: balancer.regroup(balancer.groups))
    assert largest_change(before, weights(engine)) == 0.0
    assert balancer.step().applied
    wanted = reference_run({"name": "tbgc"}, 1, MICRO_STEPS, dist.get_world_size()).params
    assert max(float((weights(engine)[n] - v).abs().max()) for n, v in wanted.items()) < 1e-6
    balancer.regroup({task: tuple(range(dist.get_world_size())) for task in toy.TASKS})
    run_own(balancer, tasks=toy.TASKS if rank == 0 else ("seg", "cls"))
    text = "task 'det' ran on rank(s) 0 and not on 1"
    raises(BalancerError, text, balancer.step)
    if rank:
        run_own(balancer, tasks=("det",))
    assert balancer.step().applied
    raises(ValueError, "add up to", lambda: balancer.regroup({"det": 1, "seg": 1, "cls": 7}))
    differing = {"det": (rank,), "seg": (1 - rank,), "cls": (1 - rank,)} if rank < 2 else balancer.groups
    if dist.get_world_size() == 2:
        raises(ValueError, "groups differ between ranks", lambda: balancer.regroup(differing))
    finish(balancer)


def check_an_error_in_a_task_apart_leaves_the_step_usable() -> None:
    for case in KINDS:
        engine = make_engine(case)
        balancer = make_apart(engine)
        done, broken = balancer.tasks[:-1], balancer.tasks[-1:]
        run_own(balancer, tasks=done)

        def fail(balancer=balancer, task=broken[0]):
            with balancer.task(task, 2):
                balancer.backward(balancer.engine(task, inputs(balancer.engine, task, 9, 9), True))
                raise KeyError("a loader's error")

        raises(KeyError, "a loader's error", fail)
        run_own(balancer, tasks=broken)
        balancer.step()
        wanted = reference_run({"name": "tbgc"}, 1, MICRO_STEPS, dist.get_world_size()).params
        assert max(float((weights(engine)[n] - v).abs().max()) for n, v in wanted.items()) < 1e-6, case
        finish(balancer)


def check_engines_that_cannot_run_tasks_apart_are_refused() -> None:
    for case, text in (("zero3 fp32", "every forward gathers"), ("zero0 fp32", "cannot keep gradients on the rank"),
                       ("zero1 bf16 fp32-accumulation", "cannot keep gradients on the rank")):  # fmt: skip
        engine = make_engine(case)
        raises(UnsupportedEngine, text, lambda: make_apart(engine))  # noqa: B023
        engine.destroy()
    engine = make_engine()
    raises(ValueError, "use norm='exact' or norm='sketch'", lambda: make_apart(engine, norm="delayed"))
    raises(ValueError, "did you mean 'tasks'", lambda: make_balancer(engine, parallel="task"))
    raises(ValueError, "groups are for parallel='tasks'", lambda: make_balancer(engine, groups={"det": 2}))
    balancer = make_balancer(engine)
    raises(BalancerError, "measure() is for parallel='tasks'", lambda: balancer.measure(lambda task: None))
    finish(balancer)


def check_measuring_changes_nothing() -> None:
    for case in KINDS:
        engine = make_engine(case)
        balancer = make_apart(engine)
        for step in range(2):
            x = inputs(engine, "det", 7, 7)
            seconds = balancer.measure(lambda task, x=x: balancer.engine(task, x, True), repeats=2)  # noqa: B023
            assert set(seconds) == set(toy.TASKS) and min(seconds.values()) > 0
            run_own(balancer, step)
            balancer.step()
        wanted = reference_run({"name": "tbgc"}, 2, MICRO_STEPS, dist.get_world_size()).params
        assert max(float((weights(engine)[n] - v).abs().max()) for n, v in wanted.items()) < 1e-6, case
        finish(balancer)


def check_training_continues_from_a_saved_state_apart() -> None:
    for norm in ("exact", "sketch"):
        options = {"norm": norm, **({} if norm == "exact" else {"sketch_size": 64})}
        moved = []
        for cut in (False, True):
            engine = make_engine(lr=1e-4)
            balancer = make_apart(engine, DWA(), **options)
            for step in range(4):
                if cut and step == 2:
                    state = balancer.state_dict()
                    balancer.detach()
                    balancer = make_apart(engine, DWA(), **options)
                    balancer.load_state_dict(state)
                run_own(balancer, step)
                balancer.step()
            moved.append(weights(engine))
            finish(balancer)
        assert largest_change(*moved) == 0.0, norm


def check_self_test_of_every_way() -> None:
    ways = [(norm, "data") for norm in ("exact", "sketch", "delayed")] + [("exact", "tasks"), ("sketch", "tasks")]
    for case in ("zero1 fp32", "zero2 fp32", "zero2 fp32 offload", "zero2 bf16", "zero3 fp32"):
        engine = make_engine(case)
        for norm, way in ways:
            if way == "data" or "zero3" not in case:
                worst = self_test(engine, TaskBalancer, norm, way)
                assert worst < (1e-5 if "bf16" not in case else 0.05), (case, norm, way, worst)
        engine.destroy()


def check_self_test_finds_gradients_that_are_scaled_wrongly() -> None:
    engine = make_engine()
    set_local = parallel.GroupedCombiner._set_local_gradients

    def forgets_its_part(self, used):
        self._parts = dict.fromkeys(self._parts, 2.0)
        set_local(self, used)

    parallel.GroupedCombiner._set_local_gradients = forgets_its_part
    try:
        raises(BalancerError, "parallel='tasks'", lambda: self_test(engine, TaskBalancer, "exact", "tasks"))
    finally:
        parallel.GroupedCombiner._set_local_gradients = set_local
    engine.destroy()


def check_extra_bytes_apart() -> None:
    """One whole gradient, one of the backbone for every further task, and a shard; ZeRO-1 keeps one in any case."""
    for case in ("zero1 fp32", "zero2 fp32"):
        balancer = make_apart(make_engine(case), Sum())
        run_own(balancer)
        balancer.step()
        module = balancer.engine.module
        whole, shared = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (module, module.backbone))
        kept = (whole if case == "zero2 fp32" else 0) + (len(balancer.tasks) - 1) * shared
        assert balancer.extra_bytes == 4 * (kept + sum(balancer._adapter.sizes)), case
        finish(balancer)
