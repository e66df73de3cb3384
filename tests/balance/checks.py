"""Checks of the balancer that run on ranks; started by `test_ranks.py` through torchrun."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import exactness
import toy

from allinone_ds import TBGC, GlobalClip, Sum, TaskBalancer, TaskClip
from allinone_ds.balance import BalancerError
from allinone_ds.balance.self_test import self_test
from allinone_ds.zero import UnsupportedEngine, gate
from tests.launcher import join_ranks, run_checks

CASES = {case.name: case for case in exactness.all_cases()}
FP32_KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload")


def make_engine(case: str = "zero2 fp32", optimizer: str = "sgd", lr: float = 0.05, **config):
    """A toy engine of a named case; keyword arguments replace keys of its config."""
    model = toy.make_model().float()
    groups = toy.param_groups(model, per_head=not CASES[case].one_group)
    if optimizer == "sgd":
        chosen = torch.optim.SGD(groups, lr=lr)
    elif optimizer == "momentum":
        chosen = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1)
    else:
        chosen = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=chosen, config={**CASES[case].config(), **config})[0]


def make_balancer(engine, weighting=None) -> TaskBalancer:
    return TaskBalancer(engine, toy.TASKS, "backbone", weighting or TBGC(0.1))


def run_task(balancer: TaskBalancer, task: str, step: int = 0, micro_steps: int = 1, factor: float = 1.0) -> None:
    dtype = next(balancer.engine.module.parameters()).dtype
    with balancer.task(task, micro_steps):
        for k in range(micro_steps):
            x = toy.inputs(task, step, k, dist.get_rank()).to(dtype)
            balancer.backward(balancer.engine(task, x, k == micro_steps - 1) * factor)


def weights(engine) -> dict[str, torch.Tensor]:
    """All weights, whole, on every rank."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().double().clone()
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


# exactness


def exact(case: str, weighting: str, micro_steps: str) -> None:
    """fp32: weights within 1e-5, norms within 1e-5. 16 bit: within that type's rounding of the same step by hand."""
    result = exactness.run_case(CASES[case], exactness.WEIGHTINGS[weighting], exactness.MICRO_STEPS[micro_steps])
    if CASES[case].dtype == "fp32":
        assert result["weights"] <= 1e-5 and result["norms"] <= 1e-5 and result["scales"] <= 1e-5, result
    else:
        rounding = {"bf16": 2**-8, "fp16": 2**-11}[CASES[case].dtype]
        assert result["weights_relative"] <= rounding and result["norms"] <= rounding, result
    assert result["overflows"] == 0


def check_plain_deepspeed_drifts_on_zero3_and_ours_does_not() -> None:
    """Tasks as micro-steps of one accumulation: heads unused in the first micro-step add onto last step's gradient."""
    engine = make_engine("zero3 fp32", lr=toy.rate({"name": "sum"}), gradient_accumulation_steps=3)
    start = {n: p.detach() for n, p in toy.make_model().named_parameters()}
    for step in range(exactness.STEPS):
        for task in toy.TASKS:
            engine.backward(engine(task, toy.inputs(task, step, 0, dist.get_rank()).float(), True), scale_wrt_gas=False)
            engine.step()
    counts = dict.fromkeys(toy.TASKS, 1)
    wanted = toy.reference_run({"name": "sum"}, exactness.STEPS, counts, dist.get_world_size()).params
    drift = largest_change(wanted, weights(engine))
    engine.destroy()
    ours = exactness.run_case(CASES["zero3 fp32"], {"name": "sum"}, (1, 1, 1))
    assert drift > 1e-2 * largest_change(start, wanted), (
        f"plain DeepSpeed no longer drifts ({drift:.1e}): update the docs"
    )
    assert ours["weights_relative"] < 1e-4, ours


def check_torchjd_weightings_equal_aggregating_the_full_jacobian() -> None:
    from torchjd.aggregation import MGDA, AlignedMTL, AlignedMTLWeighting, MGDAWeighting

    for case in ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32"):
        for weighting, aggregator in ((AlignedMTLWeighting(), AlignedMTL()), (MGDAWeighting(), MGDA())):
            engine = make_engine(case, lr=0.1)
            balancer = make_balancer(engine, weighting)
            for task in toy.TASKS:
                run_task(balancer, task, factor=1 / toy.LOSS_SCALE[task])  # else the Gram matrix is singular in fp32
            balancer.step()
            model = toy.make_model()
            found = {
                task: {
                    n: v / toy.LOSS_SCALE[task]
                    for n, v in toy.gradients(model, task, 0, 1, dist.get_world_size()).items()
                }
                for task in toy.TASKS
            }
            names = [n for n in found["det"] if n.startswith("backbone.")]
            jacobian = torch.stack([torch.cat([found[task][n].reshape(-1) for n in names]) for task in toy.TASKS])
            wanted = aggregator(jacobian)
            moves = {n: (before - after) / 0.1 for n, before, after in _moves(model, engine)}
            got = torch.cat([moves[n].reshape(-1) for n in names])
            assert float((got - wanted).norm() / wanted.norm()) < 1e-4, (case, weighting)
            raw = found["seg"]["heads.seg.weight"]
            assert float((moves["heads.seg.weight"] - raw).norm() / raw.norm()) < 1e-4, "heads keep their raw gradient"
            assert balancer.extra_bytes == 3 * 4 * sum(balancer._shards.sizes)
            finish(balancer)


def _moves(model, engine):
    after = weights(engine)
    return [(n, p.detach(), after[n]) for n, p in model.named_parameters() if p.requires_grad]


def check_reported_global_norm_is_that_of_the_balanced_sum() -> None:
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32", "zero1 bf16 fp32-accumulation", "zero2 fp32 offload",
                 "zero3 fp32 offload"):  # fmt: skip
        engine = make_engine(case)
        balancer = make_balancer(engine)
        for task in toy.TASKS:
            run_task(balancer, task)
        report = balancer.step()
        found = {t: toy.gradients(toy.make_model(), t, 0, 1, dist.get_world_size()) for t in toy.TASKS}
        total: dict[str, torch.Tensor] = {}
        for task, gradient in found.items():
            for name, value in gradient.items():
                total[name] = total.get(name, 0) + value * float(report.scales[task])
        wanted = float(torch.cat([v.reshape(-1) for v in total.values()]).norm())
        got = float(engine.get_global_grad_norm())
        assert abs(got / wanted - 1) < (2e-2 if "bf16" in case else 1e-4), (case, got, wanted)
        finish(balancer)


def check_shared_may_be_parameters_or_a_nested_name() -> None:
    for case in ("zero1 fp32", "zero3 fp32"):
        norms = {}
        for how in ("backbone", "parameters", "backbone.stem"):
            engine = make_engine(case)
            shared = engine.module.backbone.parameters() if how == "parameters" else how
            balancer = TaskBalancer(engine, toy.TASKS, shared, TBGC(0.1))
            for task in toy.TASKS:
                run_task(balancer, task)
            norms[how] = {task: float(norm) for task, norm in balancer.step().norms.items()}
            finish(balancer)
        assert norms["parameters"] == norms["backbone"], case
        for task in toy.TASKS:
            stem = toy.gradients(toy.make_model(), task, 0, 1, dist.get_world_size())
            wanted = torch.cat([v.reshape(-1) for n, v in stem.items() if n.startswith("backbone.stem")]).norm()
            assert abs(norms["backbone.stem"][task] / float(wanted) - 1) < 1e-5, (case, task)


# memory


class _Largest(TorchDispatchMode):
    """The largest number of elements any operation inside produces, views left aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.numel = max(self.numel, value.numel())
        return result


def check_one_extra_shard_and_nothing_of_full_size() -> None:
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32"):
        for weighting, shards in ((TBGC(0.1), 1), (Sum(), 1), (GlobalClip(), 1), (TaskClip(), 1),
                                  (TBGC(target="mean"), 3)):  # fmt: skip
            engine = make_engine(case)
            balancer = make_balancer(engine, weighting)
            shard = sum(balancer._shards.sizes)
            full = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
            assert shard <= full / dist.get_world_size() + 64, "a shard is a rank's part"
            add, finish_sum, largest = balancer._combiner.add, balancer._combiner.finish, _Largest()

            def watched(call, *args, largest=largest):
                with largest:
                    return call(*args)

            balancer._combiner.add = partial(watched, add)
            balancer._combiner.finish = partial(watched, finish_sum)
            for step in range(2):
                for task in toy.TASKS:
                    run_task(balancer, task, step, micro_steps=2)
                balancer.step()
            assert balancer.extra_bytes == shards * shard * 4, (case, weighting, balancer.extra_bytes)
            assert largest.numel <= shard, (case, weighting, largest.numel, shard)
            finish(balancer)


# partial steps and tasks left out


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


def check_partial_steps_equal_torch_with_absent_gradients() -> None:
    """AdamW over full and partial steps: heads' momentum, decay and step counts as if the heads had not been there."""
    steps = (toy.TASKS, ("det",), ("seg", "cls"), toy.TASKS)
    world = dist.get_world_size()
    model = toy.make_model()
    reference = torch.optim.AdamW(toy.param_groups(model), lr=0.01, weight_decay=0.1)
    for step, tasks in enumerate(steps):
        reference.zero_grad()
        for task in tasks:
            found = toy.gradients(model, task, step, 1, world)
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
        before, scale = weights(engine), balancer._shards.loss_scale
        for task in toy.TASKS:
            run_task(balancer, task, factor=3e4 if task == "seg" else 1.0)  # finite loss, gradient beyond 65504
        report = balancer.step()
        assert report.overflow and not report.skipped and not report.applied, case
        assert largest_change(before, weights(engine)) == 0.0, case
        assert balancer._shards.loss_scale == scale / 2, (case, balancer._shards.loss_scale)
        for task in toy.TASKS:
            run_task(balancer, task, factor=float("nan") if task == "seg" else 1.0)  # not the scaler's business
        report = balancer.step()
        assert report.skipped == ("seg",) and report.applied and balancer._shards.loss_scale == scale / 2, case
        assert largest_change(before, weights(engine), "heads.det") > 0, case
        finish(balancer)


# misuse


def check_misuse_is_an_error_and_changes_nothing() -> None:
    for case in ("zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload"):
        _misuse(case)


def _misuse(case: str) -> None:
    engine = make_engine(case)
    balancer = make_balancer(engine)
    x = toy.inputs("det", 0, 0, dist.get_rank()).float()
    before = weights(engine)

    def enter(name, micro_steps=1, calls=1, loss=None):
        with balancer.task(name, micro_steps):
            for _ in range(calls):
                balancer.backward(engine("det", x) if loss is None else loss)

    def nested():
        with balancer.task("det"), balancer.task("seg"):
            pass

    raises(BalancerError, "did you mean 'det'", lambda: enter("dett"))
    raises(BalancerError, "before task(s) det, seg, cls", balancer.step)
    raises(BalancerError, "outside a task", lambda: balancer.backward(engine("det", x)))
    raises(BalancerError, "after 1 of 2 micro-steps", lambda: enter("det", 2, 1))
    raises(BalancerError, "more than its 1 micro-steps", lambda: enter("det", 1, 2))
    raises(BalancerError, "micro_steps = 0", lambda: enter("det", 0))
    raises(BalancerError, "shape (2,)", lambda: enter("det", loss=torch.ones(2, requires_grad=True)))
    raises(BalancerError, "without a graph", lambda: enter("det", loss=torch.ones(())))
    raises(BalancerError, "float", lambda: enter("det", loss=1.0))
    raises(BalancerError, "engine.step() was called", engine.step)
    raises(BalancerError, "engine.backward() was called", lambda: engine.backward(engine("det", x)))
    raises(BalancerError, "begins inside task 'det'", nested)
    run_task(balancer, "det")
    raises(BalancerError, "a second time", lambda: enter("det"))
    raises(BalancerError, "before task(s) seg, cls ran (ran: det)", balancer.step)
    assert largest_change(before, weights(engine)) == 0.0
    for task in ("seg", "cls"):
        run_task(balancer, task)
    balancer.step()
    expect_one_step(engine, case)
    raises(BalancerError, "already has a TaskBalancer", lambda: make_balancer(engine))
    balancer.detach()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine("det", x))
    engine.step()
    engine.destroy()


def expect_one_step(engine, case: str) -> None:
    """The weights are those of one undisturbed TBGC step."""
    wanted = toy.reference_run({"name": "tbgc"}, 1, dict.fromkeys(toy.TASKS, 1), dist.get_world_size())
    got = weights(engine)
    for name, value in wanted.params.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=f"{case} {name}")


def check_an_exception_inside_a_task_leaves_the_step_usable() -> None:
    for case in FP32_KINDS:
        engine = make_engine(case)
        balancer = make_balancer(engine)
        run_task(balancer, "det")

        def broken(balancer=balancer, engine=engine):
            with balancer.task("seg", 2):
                balancer.backward(engine("seg", toy.inputs("seg", 9, 9, dist.get_rank()).float(), True))
                raise KeyError("a loader's error")

        raises(KeyError, "a loader's error", broken)
        for task in ("seg", "cls"):
            run_task(balancer, task)
        balancer.step()
        expect_one_step(engine, case)
        finish(balancer)


def check_ranks_in_different_tasks_are_named() -> None:
    if dist.get_world_size() == 1:
        return
    balancer = make_balancer(make_engine("zero2 fp32"))
    mine = "det" if dist.get_rank() == 0 else "seg"
    raises(BalancerError, "rank 0: task 'det', 1 micro-steps; rank 1: task 'seg'", lambda: run_task(balancer, mine))
    steps = 1 + dist.get_rank()
    raises(BalancerError, "rank 1: task 'det', 2 micro-steps", lambda: run_task(balancer, "det", micro_steps=steps))
    for task in toy.TASKS:
        run_task(balancer, task)
    balancer.step()
    finish(balancer)


def check_engines_that_cannot_be_balanced_are_refused() -> None:
    clip_default = {k: v for k, v in CASES["zero2 fp32"].config().items() if k != "gradient_clipping"}
    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=clip_default)[0]
    raises(UnsupportedEngine, "gradient_clipping is 1.0", lambda: make_balancer(engine))
    TaskBalancer(engine, toy.TASKS, "backbone", Sum(), allow_gradient_clipping=True).detach()
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    for wrong, text in (([], "nothing to balance"), (frozen, "nothing to balance"), ([torch.ones(1)], "nn.Parameter"),
                        (list(toy.make_model().parameters()), "not the engine's module's")):  # fmt: skip
        raises((ValueError, TypeError), text, lambda wrong=wrong: TaskBalancer(
            engine, toy.TASKS, wrong, Sum(), allow_gradient_clipping=True))  # fmt: skip
    raises(ValueError, "each once", lambda: TaskBalancer(engine, ("det", "det"), "backbone", Sum(),
                                                         allow_gradient_clipping=True))  # fmt: skip
    raises(ValueError, "did you mean 'backbone'", lambda: TaskBalancer(engine, toy.TASKS, "backbon", Sum(),
                                                                       allow_gradient_clipping=True))  # fmt: skip
    engine.destroy()
    raises(TypeError, "pass the engine", lambda: make_balancer(model))
    unmanaged = make_engine("zero2 fp32", managed_gradient_accumulation=False)
    raises(UnsupportedEngine, "managed_gradient_accumulation", lambda: make_balancer(unmanaged))
    unmanaged.destroy()


# start-up self-test


def check_self_test_passes_on_every_kind() -> None:
    for case in (*FP32_KINDS, "zero0 bf16", "zero1 bf16 fp32-accumulation", "zero2 bf16", "zero2 fp16", "zero3 fp16"):
        engine = make_engine(case)
        worst = self_test(engine)
        assert worst < (1e-5 if "fp32" in case and "bf16" not in case else 0.05), (case, worst)
        engine.destroy()


def check_self_test_finds_a_broken_adapter() -> None:
    """A release whose shards survive `release` would apply a task's gradient again."""
    engine = make_engine("zero3 fp32")
    release = gate.Stage3Shards.release
    gate.Stage3Shards.release = lambda self: None
    try:
        raises(BalancerError, "self-test", lambda: self_test(engine))
    finally:
        gate.Stage3Shards.release = release
    engine.destroy()


def check_unchecked_release_warns_and_tests_itself() -> None:
    engine = make_engine("zero2 fp32")
    checked, gate.CHECKED_RELEASES = gate.CHECKED_RELEASES, ()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            balancer = make_balancer(engine)
    finally:
        gate.CHECKED_RELEASES = checked
    assert any("self-test" in str(w.message) for w in caught)
    finish(balancer)


def all_checks(world: int) -> dict:
    """The checks of a world size; 2 ranks run everything."""
    checks = {}
    if world == 2:
        for case in CASES:
            checks[f"exact[{case}]"] = partial(exact, case, "tbgc", "1/2/4")
        for stage in range(4):
            for weighting in exactness.WEIGHTINGS:
                checks[f"exact[zero{stage} fp32, {weighting}]"] = partial(
                    exact, f"zero{stage} fp32", weighting, "1/2/4"
                )
        checks |= {n.removeprefix("check_"): f for n, f in globals().items() if n.startswith("check_")}
    else:
        for stage in range(4):
            checks[f"exact[zero{stage} fp32]"] = partial(exact, f"zero{stage} fp32", "tbgc", "1/2/4")
            checks[f"exact[zero{stage} bf16]"] = partial(exact, f"zero{stage} bf16", "tbgc", "1/1/1")
        checks["heads_of_absent_tasks_do_not_move"] = check_heads_of_absent_tasks_do_not_move
        checks["one_extra_shard_and_nothing_of_full_size"] = check_one_extra_shard_and_nothing_of_full_size
    return checks


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: (
        True
    )  # torch computes fp16 on any CPU; DeepSpeed asks for instructions
    join_ranks()
    wanted = sys.argv[2:]
    chosen = all_checks(dist.get_world_size())
    run_checks({n: c for n, c in chosen.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
