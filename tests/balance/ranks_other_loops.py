"""Checks of loops that use an engine or a balancer in unusual ways; every rank runs them (see `ranks_balancer.py`)."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from allinone_ds import TBGC, GramWeighting, Sum, TaskBalancer, Weighting
from allinone_ds.errors import BalancerError, NonFinite, UnsupportedEngine
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

LOCAL = ("sketch", "delayed")
KINDS = ("zero0 fp32", "zero1 fp32", "zero3 fp32 offload")


def run_step(balancer: TaskBalancer, step: int = 0, tasks: tuple[str, ...] = toy.TASKS):
    for task in tasks:
        run_task(balancer, task, step)
    return balancer.step()


def check_gradients_of_earlier_plain_steps_are_forgotten() -> None:
    """An engine that took a plain step, or a backward without a step, gives the norms of a fresh engine."""
    for case in FP32_KINDS:
        norms = {}
        for use in ("fresh", "backward", "step"):
            engine = make_engine(case, lr=0.0)
            if use != "fresh":
                engine.backward(engine("seg", inputs(engine, "seg", 9, 0)))
            if use == "step":
                engine.step()
            balancer = make_balancer(engine, Sum())
            norms[use] = {task: float(norm) for task, norm in run_step(balancer).whole_norms.items()}
            finish(balancer)
        for task in toy.TASKS:
            for use in ("backward", "step"):
                assert abs(norms[use][task] / norms["fresh"][task] - 1) < 1e-5, (case, use, task, norms)


def check_every_micro_step_counts_wherever_its_loss_comes_from() -> None:
    """A loss from `engine.module`, and two forwards before two backwards, give what a loss of the engine gives."""
    for case in (*FP32_KINDS, "zero3 bf16", "zero1 bf16 fp32-accumulation"):
        results = []
        for way in ("engine", "module", "forwards first"):
            engine = make_engine(case)
            balancer = make_balancer(engine)
            for task in toy.TASKS:
                with balancer.task(task, micro_steps=2):
                    forward = engine.module if way == "module" else engine
                    made = (forward(task, inputs(engine, task, 0, k)) for k in range(2))
                    for loss in list(made) if way == "forwards first" else made:
                        balancer.backward(loss)
            balancer.step()
            results.append(weights(engine))
            finish(balancer)
        for result, way in zip(results[1:], ("module", "forwards first"), strict=True):
            assert largest_change(results[0], result) < (1e-7 if "fp32" in case else 1e-3), (case, way)


class Seen(Weighting):
    """Keeps the order of the tasks and the norms that it sees; weights tasks by their place."""

    streams = False

    def factors(self, record):
        self.tasks, self.seen = record.tasks, record.norms.tolist()
        return torch.arange(1.0, len(record.tasks) + 1)


def check_records_follow_the_declared_order() -> None:
    """Whatever the order in which tasks run, a method with one entry per task meets the same task."""
    for norm in ("exact", "delayed"):
        results = []
        for order in (toy.TASKS, toy.TASKS[::-1]):
            engine = make_engine("zero2 fp32", lr=0.0)
            balancer = make_balancer(engine, seen := Seen(), norm=norm, cosines_every=1)
            for step in range(2):
                report = run_step(balancer, step, order)
            assert seen.tasks == report.tasks == toy.TASKS, (norm, order, seen.tasks)
            results.append((seen.seen, report.scales, report.cosines()))
            finish(balancer)
        (one, scales, cosines), (other, other_scales, other_cosines) = results
        assert all(abs(a / b - 1) < 1e-4 for a, b in zip(one, other, strict=True)), norm
        assert {t: float(s) for t, s in scales.items()} == {t: float(s) for t, s in other_scales.items()}
        assert all(abs(cosines[pair] - other_cosines[pair]) < 1e-4 for pair in cosines)


class NotFinite(Weighting):
    """A factor of NaN for one task."""

    def __init__(self, streams: bool):
        self.streams = streams

    def factors(self, record):
        return torch.tensor([float("nan") if task == "seg" else 1e-3 for task in record.tasks])


def check_a_factor_that_is_not_finite_leaves_its_task_out() -> None:
    for case in KINDS:
        for streams, norm in ((True, "exact"), (False, "exact"), (True, "sketch")):
            if norm == "sketch" and case == "zero0 fp32":
                continue
            engine = make_engine(case)
            balancer = make_balancer(engine, NotFinite(streams), norm=norm)
            before = weights(engine)
            report = run_step(balancer)
            after = weights(engine)
            assert report.skipped == ("seg",) and report.applied and not report.overflow, (case, streams, norm)
            assert balancer.skipped_steps["seg"] == 1 and float(report.scales["seg"]) == 0
            assert all(bool(torch.isfinite(value).all()) for value in after.values()), (case, streams, norm)
            assert largest_change(before, after, "backbone") > 0
            assert largest_change(before, after, "heads.seg") == 0
            finish(balancer)
    engine = make_engine()
    balancer = make_balancer(engine, NotFinite(True), nonfinite="stop")
    raises(NonFinite, "seg", lambda: run_step(balancer))
    finish(balancer)


def check_a_zero_backbone_gradient_is_not_rescaled() -> None:
    """A task of its head alone: its norm on the backbone is 0, and its head keeps its gradient."""
    for weighting in (TBGC(rescale="always"), TBGC(target="mean", rescale="always")):
        engine = make_engine("zero2 fp32")
        balancer = make_balancer(engine, weighting)
        for task in toy.TASKS:
            with balancer.task(task):
                loss = engine(task, inputs(engine, task, 0, 0))
                head = sum(p.square().sum() for p in engine.module.heads["seg"].parameters())
                balancer.backward(head + 0 * loss if task == "seg" else loss)
        report = balancer.step()
        assert float(report.norms["seg"]) == 0 and float(report.scales["seg"]) == 1, (weighting, report.scales)
        assert float(report.whole_norms["seg"]) > 0
        finish(balancer)


def check_no_sync_is_refused() -> None:
    for case, norm in (("zero0 fp32", "exact"), ("zero1 fp32", "exact"), ("zero1 fp32", "sketch")):
        engine = make_engine(case)
        balancer = make_balancer(engine, norm=norm)
        with engine.no_sync():
            raises(BalancerError, "no_sync", lambda balancer=balancer: run_task(balancer, "det"))
        assert run_step(balancer).applied, "usable afterwards"
        finish(balancer)


def check_thawed_parameters_are_refused() -> None:
    engine = make_engine("zero2 fp32")
    bias = engine.module.backbone.stem.bias
    bias.requires_grad_(False)
    balancer = make_balancer(engine)
    run_step(balancer)
    bias.requires_grad_(True)
    for task in toy.TASKS:
        run_task(balancer, task)
    raises(BalancerError, "'backbone.stem.bias' was frozen", balancer.step)
    finish(balancer)


def check_detach_gives_the_accumulation_boundary_back() -> None:
    """With 4 accumulation steps the detached engine steps at each fourth micro-step."""
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32"):
        engine = make_engine(case, gradient_accumulation_steps=4)
        balancer = make_balancer(engine)
        run_step(balancer)
        balancer.detach()
        boundaries = []
        for _ in range(8):
            boundaries.append(engine.is_gradient_accumulation_boundary())
            engine.backward(engine("det", inputs(engine, "det", 0, 0)))
            engine.step()
        assert sum(boundaries) == 2, (case, boundaries)
        engine.destroy()


class Raises(Weighting):
    """Raises in its first call."""

    def __init__(self, streams: bool):
        self.streams, self.calls = streams, 0

    def factors(self, record):
        self.calls += 1
        if self.calls == 1:
            raise ZeroDivisionError("of the weighting")
        return torch.full((len(record.tasks),), 1e-3)


def check_an_error_of_the_weighting_leaves_the_balancer_usable() -> None:
    for case in ("zero0 fp32", "zero2 fp32", "zero3 fp32"):
        for streams in (True, False):
            engine = make_engine(case)
            balancer = make_balancer(engine, Raises(streams))
            raises(ZeroDivisionError, "of the weighting", lambda balancer=balancer: run_step(balancer))
            reference = make_engine(case)
            other = make_balancer(reference, GramWeighting(lambda gram: torch.full((3,), 1e-3)))
            assert run_step(balancer).applied
            run_step(other)
            start = "backbone"
            assert largest_change(weights(reference), weights(engine), start) < 1e-7, (case, streams)
            finish(balancer)
            finish(other)


def check_a_step_can_be_abandoned() -> None:
    for case in KINDS:
        for norm in ("exact", *(LOCAL if case != "zero0 fp32" else ())):
            results = []
            for disturbed in (False, True):
                engine = make_engine(case)
                balancer = make_balancer(engine, norm=norm)
                if disturbed:
                    run_task(balancer, "seg", step=7)
                    balancer.abandon()
                for step in range(2):
                    run_step(balancer, step)
                results.append(weights(engine))
                finish(balancer)
            limit = 1e-6 if norm == "exact" else 1e-4  # a new step has new sketches
            assert largest_change(*results) < limit, (case, norm)
    engine = make_engine()
    balancer = make_balancer(engine)
    with balancer.task("det"):
        raises(BalancerError, "inside task 'det'", balancer.abandon)
        balancer.backward(engine("det", inputs(engine, "det", 0, 0)))
    finish(balancer)


def check_sparse_embeddings_are_refused() -> None:
    engine = make_engine()
    engine.module.embedding = nn.Embedding(3, 2, sparse=True)
    raises(UnsupportedEngine, "sparse=False", lambda: make_balancer(engine))
    engine.destroy()


def check_activations_in_host_memory_are_refused_on_the_cpu() -> None:
    """DeepSpeed's function would compute the backward of emptied tensors; a GPU has memory of its own to copy from."""
    engine = make_engine()
    deepspeed.checkpointing.CPU_CHECKPOINT = True
    try:
        if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
            raises(UnsupportedEngine, "cpu_checkpointing of DeepSpeed on the CPU", lambda: make_balancer(engine))
    finally:
        deepspeed.checkpointing.CPU_CHECKPOINT = False
    engine.destroy()


def check_the_backbone_may_be_given_as_a_module() -> None:
    engine = make_engine()
    balancer = TaskBalancer(engine, toy.TASKS, engine.module.backbone, TBGC())
    by_name = {task: float(norm) for task, norm in run_step(balancer).norms.items()}
    finish(balancer)
    engine = make_engine()
    balancer = make_balancer(engine, TBGC())
    assert by_name == {task: float(norm) for task, norm in run_step(balancer).norms.items()}
    finish(balancer)
    engine = make_engine()
    raises(ValueError, "do not belong", lambda: TaskBalancer(engine, toy.TASKS, nn.Linear(2, 2), TBGC()))
    engine.destroy()


def _hooked_run(norm: str, before: bool, hook=None) -> list[dict[str, float]]:
    """Return the norms of three steps with `hook` on all parameters, registered before or after the balancer.

    A second hook is registered for the second step alone.
    """
    engine = make_engine("zero2 fp32", lr=0.0)
    params = [p for p in engine.module.parameters() if p.requires_grad]
    if hook and before:
        _ = [param.register_hook(hook) for param in params]
    balancer = make_balancer(engine, Sum(), norm=norm)
    if hook and not before:
        _ = [param.register_hook(hook) for param in params]
    found = []
    for step in range(3):
        further = engine.module.backbone.stem.weight.register_hook(lambda g: 3 * g) if hook and step == 1 else None
        report = run_step(balancer)
        if further is not None:
            further.remove()
        found.append({**{t: float(n) for t, n in report.norms.items()},
                      **{f"{t} whole": float(n) for t, n in report.whole_norms.items()}})  # fmt: skip
    finish(balancer)
    return found


def check_norms_count_what_hooks_of_the_user_do() -> None:
    """Also those that were registered after the balancer, or between two steps."""
    for hook in (lambda g: 5 * g, lambda g: g.clamp(-1e-3, 1e-3)):
        wanted = _hooked_run("exact", True, hook)
        plain = _hooked_run("exact", True)
        assert abs(wanted[0]["seg"] / plain[0]["seg"] - 1) > 0.1, "the hook matters"
        assert abs(wanted[1]["seg"] / wanted[0]["seg"] - 1) > 1e-3, "and so does the one of the second step"
        for norm in ("exact", "sketch", "delayed"):
            for before in (True, False):
                for step, (one, other) in enumerate(zip(wanted, _hooked_run(norm, before, hook), strict=True)):
                    for key in one:
                        assert abs(one[key] / other[key] - 1) < 1e-3, (norm, before, step, key, one, other)


def check_hooks_of_modules_count() -> None:
    """A full backward hook changes what flows into earlier layers, in every norm."""
    results = []
    for norm in ("exact", "delayed"):
        engine = make_engine("zero2 fp32", lr=0.0)
        balancer = make_balancer(engine, Sum(), norm=norm)
        layer = engine.module.backbone.blocks[1]
        layer.register_full_backward_hook(lambda module, ingoing, outgoing: tuple(4 * g for g in ingoing))
        run_step(balancer)
        results.append({t: float(n) for t, n in run_step(balancer).norms.items()})
        finish(balancer)
    assert all(abs(results[0][task] / results[1][task] - 1) < 1e-3 for task in toy.TASKS), results


def check_post_accumulate_hooks_are_refused_where_tasks_share_a_gradient() -> None:
    engine = make_engine("zero2 fp32")
    balancer = make_balancer(engine, norm="delayed")
    run_step(balancer)
    handle = engine.module.backbone.stem.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    raises(BalancerError, "'backbone.stem.weight' has a hook", lambda: run_task(balancer, "det"))
    handle.remove()
    assert run_step(balancer).applied
    balancer.detach()
    engine.module.backbone.stem.weight.register_post_accumulate_grad_hook(lambda p: None)
    raises(BalancerError, "'backbone.stem.weight' has a hook", lambda: make_balancer(engine, norm="delayed"))
    make_balancer(engine, norm="exact").detach()
    engine.destroy()


def check_parameters_can_be_gathered_inside_a_task() -> None:
    """To read them and to change them, as with plain DeepSpeed; a later gather in the same step sees the change."""
    case = "zero3 fp32"
    for place in ("before the forward", "between forward and backward", "after the backward", "after an error"):
        for modifier in (None, 0):
            norms = []
            for inside in (False, True):
                engine = make_engine(case, lr=0.0)
                balancer = make_balancer(engine, Sum())
                stem = engine.module.backbone.stem.weight

                def gather(engine=engine, stem=stem, modifier=modifier):
                    params = [stem, *engine.module.heads["seg"].parameters()]
                    with deepspeed.zero.GatheredParameters(params, modifier_rank=modifier):
                        assert tuple(stem.shape) == (13, 9)
                        if modifier is not None and dist.get_rank() == modifier:
                            stem.data.mul_(1.5)

                run_task(balancer, "det")
                if place == "after an error":
                    handle = engine.module.backbone.blocks[0].register_forward_hook(lambda *_: 1 / 0)
                    raises(ZeroDivisionError, "", lambda balancer=balancer: run_task(balancer, "cls"))
                    handle.remove()
                    gather()
                if not inside and place == "before the forward":
                    gather()
                x = inputs(engine, "seg", 0, 0)
                with balancer.task("seg"):
                    if inside and place == "before the forward":
                        gather()
                    loss = engine("seg", x, True)
                    if inside and place == "between forward and backward" and modifier is None:
                        gather()
                    balancer.backward(loss)
                    if inside and place == "after the backward":
                        gather()
                if not inside and place == "after the backward":
                    gather()
                run_task(balancer, "cls")
                norms.append({task: float(norm) for task, norm in balancer.step().norms.items()})
                finish(balancer)
            assert all(abs(norms[0][t] / norms[1][t] - 1) < 1e-6 for t in toy.TASKS), (place, modifier, norms)
