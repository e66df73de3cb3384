"""Checks of the balancer on ranks; started by test_balancer.py."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
import torchjd.aggregation
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds import TBGC, GlobalClip, Sum, TaskBalancer, TaskClip, weighting_from_config
from allinone_ds.balance.options import TORCHJD
from allinone_ds.testing.reference import gradients, reference_run
from tests.balance import (
    ranks_devices,
    ranks_error_paths,
    ranks_freezing,
    ranks_gradients,
    ranks_habits,
    ranks_local_norms,
    ranks_loss_scales,
    ranks_misuse,
    ranks_muon,
    ranks_other_loops,
    ranks_partial_steps,
    ranks_task_parallel,
    ranks_traces,
    ranks_weightings,
)
from tests.balance.engines import (
    CASES,
    cases,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    run_case,
    run_task,
    toy,
    weights,
)
from tests.launcher import join_ranks, run_checks

# cases


def exact(case: str, weighting: str, micro_steps: str) -> None:
    """fp32: weights within 1e-5, norms within 1e-5. 16 bit: within that type's rounding of the same step by hand.

    With `norm="features"` the tasks add up in the engine, in 16 bit too, which the step by hand does not: twice that;
    and `torch_autocast` is compared with float64.
    Muon's iteration enlarges the smallest singular values some 500 times, with the rounding in them; masters in bf16
    round the weights, which is large beside 5 steps.
    """
    result = run_case(CASES[case], cases.WEIGHTINGS[weighting], cases.MICRO_STEPS[micro_steps])
    rounds = CASES[case].rounds
    if rounds == "fp32":
        assert result["weights"] <= 1e-5 and result["norms"] <= 1e-5 and result["scales"] <= 1e-5, result
    else:
        rounding = {"bf16": 2**-8, "fp16": 2**-11}[rounds] * (2 if "norm=features" in case or "autocast" in case else 1)
        rounding *= 50 if CASES[case].optimizer != "sgd" or "masters" in case else 1
        assert result["weights_relative"] <= rounding and result["norms"] <= rounding, result
    assert result["overflows"] == 0


def check_plain_deepspeed_drifts_on_zero3_and_ours_does_not() -> None:
    """Tasks as micro-steps of one accumulation: heads unused in the first micro-step add onto last step's gradient."""
    engine = make_engine("zero3 fp32", lr=toy.rate({"name": "sum"}), gradient_accumulation_steps=3)
    start = {n: p.detach() for n, p in toy.make_model().named_parameters()}
    for step in range(cases.STEPS):
        for task in toy.TASKS:
            engine.backward(engine(task, inputs(engine, task, step, 0), True), scale_wrt_gas=False)
            engine.step()
    counts = dict.fromkeys(toy.TASKS, 1)
    wanted = reference_run({"name": "sum"}, cases.STEPS, counts, dist.get_world_size()).params
    drift = largest_change(wanted, weights(engine))
    engine.destroy()
    ours = run_case(CASES["zero3 fp32"], {"name": "sum"}, (1, 1, 1))
    assert drift > 1e-2 * largest_change(start, wanted), (
        f"plain DeepSpeed no longer drifts ({drift:.1e}): update the docs"
    )
    assert ours["weights_relative"] < 1e-4, ours


LARGE = 100.0
"""A learning rate that moves weights far, so that the move is known to many digits."""
METHODS = {
    "aligned_mtl": {}, "mgda": {}, "upgrad": {}, "dualproj": {}, "imtl_g": {}, "pcgrad": {}, "gradvac": {},
    "cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0},
    "nash_mtl": {"n_tasks": 3, "max_norm": 0.0, "update_weights_every": 1, "optim_niter": 20},
}  # fmt: skip


def check_torchjd_methods_equal_aggregating_the_full_jacobian() -> None:
    """Every method on ZeRO-2, two of them on each stage, against torchjd on the float64 Jacobian of one process."""
    model = toy.make_model()
    found = {
        task: {n: v / toy.LOSS_SCALE[task] for n, v in gradients(model, task, 0, 1, dist.get_world_size()).items()}
        for task in toy.TASKS
    }
    names = [n for n in found["det"] if n.startswith("backbone.")]
    jacobian = torch.stack([torch.cat([found[task][n].reshape(-1) for n in names]) for task in toy.TASKS])
    runs = [("zero2 fp32", method) for method in METHODS]
    runs += [
        (case, method) for case in ("zero0 fp32", "zero1 fp32", "zero3 fp32") for method in ("aligned_mtl", "mgda")
    ]
    for case, method in runs:
        engine = make_engine(case, lr=LARGE)
        balancer = make_balancer(engine, weighting_from_config({"name": method, **METHODS[method]}))
        for task in toy.TASKS:
            run_task(balancer, task, factor=1 / toy.LOSS_SCALE[task])  # else the Gram matrix is singular in fp32
        torch.manual_seed(dist.get_rank())  # some methods draw at random: rank 0's draw counts
        balancer.step()
        torch.manual_seed(0)
        wanted = getattr(torchjd.aggregation, TORCHJD[method].removesuffix("Weighting"))(**METHODS[method])(jacobian)
        moves = {n: (before - after) / LARGE for n, before, after in _moves(model, engine)}
        got = torch.cat([moves[n].reshape(-1) for n in names])
        off = float((got - wanted).norm() / wanted.norm())
        assert off < 1e-5, (case, method, off)
        raw = found["seg"]["heads.seg.weight"]
        assert float((moves["heads.seg.weight"] - raw).norm() / raw.norm()) < 1e-5, "heads keep their raw gradient"
        assert balancer.extra_bytes == 3 * 4 * sum(balancer._adapter.sizes)
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
        found = {t: gradients(toy.make_model(), t, 0, 1, dist.get_world_size()) for t in toy.TASKS}
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
            stem = gradients(toy.make_model(), task, 0, 1, dist.get_world_size())
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
            shard = sum(balancer._adapter.sizes)
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


FEW = ("zero0 fp32 muon", "zero1 fp32 muon", "zero2 fp32 muon", "zero3 fp32 muon", "zero2 fp16 muon",
       "zero1 bf16 fp32-accumulation muon", "zero3 fp32 muon joint backbone", "zero2 fp32 muon joint features",
       "zero1 fp32 muon norm=features", "zero2 fp32 muon tasks apart", "zero3 fp32 muon sub-groups",
       "zero2 torch_autocast bf16", "zero3 torch_autocast fp16", "zero2 fp32 checkpointing of DeepSpeed",
       "zero0 fp32 managed_gradient_accumulation=0", "zero1 fp32 managed_gradient_accumulation=0",
       "zero2 fp32 managed_gradient_accumulation=0", "zero3 fp32 managed_gradient_accumulation=0",
       "zero2 bf16 masters and states", "zero3 fp32 adamw sub-groups")  # fmt: skip
"""The cases with other optimizers and options that run as tests."""


def is_test(case: str) -> bool:
    """Return whether a case runs as a test; `benchmarks.correctness.exactness` runs all."""
    if "hpz" in case:  # tests/zero/test_hpz.py has the others, on 4 ranks
        return case == "zero3 fp32 hpz"
    if "norm=features" in case and any(word in case for word in ("checkpointing", "overlap", "accum", "offload")):
        return False  # tests/balance/test_norm_features.py has them in other models
    plain = CASES[case].optimizer == "sgd" and not CASES[case].keys and CASES[case].checkpointing != "deepspeed"
    return plain or case in FEW


def all_checks(world: int) -> dict:
    """The checks of a world size; 2 ranks run everything."""
    checks = {}
    if world == 2:
        for case in filter(is_test, CASES):
            checks[f"exact[{case}]"] = partial(exact, case, "tbgc", "1/2/4")
        for stage in range(4):
            for weighting in cases.WEIGHTINGS if stage == 2 else ("sum", "global_clip", "tbgc heads none", "tbgc max"):
                checks[f"exact[zero{stage} fp32, {weighting}]"] = partial(
                    exact, f"zero{stage} fp32", weighting, "1/2/4"
                )
        checks |= _all_in(globals())
        for module in (
            ranks_devices,
            ranks_freezing,
            ranks_partial_steps,
            ranks_misuse,
            ranks_muon,
            ranks_gradients,
            ranks_habits,
            ranks_local_norms,
            ranks_loss_scales,
            ranks_other_loops,
            ranks_task_parallel,
            ranks_traces,
            ranks_weightings,
        ):
            checks |= _all_in(vars(module))
    else:
        for stage in range(4):
            checks[f"exact[zero{stage} fp32]"] = partial(exact, f"zero{stage} fp32", "tbgc", "1/2/4")
            checks[f"exact[zero{stage} bf16]"] = partial(exact, f"zero{stage} bf16", "tbgc", "1/1/1")
        checks["heads_of_absent_tasks_do_not_move"] = ranks_partial_steps.check_heads_of_absent_tasks_do_not_move
        checks["one_extra_shard_and_nothing_of_full_size"] = check_one_extra_shard_and_nothing_of_full_size
        if world == 4:
            checks |= {f"exact[{c}]": partial(exact, c, "tbgc", "1/2/4") for c in CASES if "fp32 tasks apart" in c}
            checks |= _all_in(vars(ranks_task_parallel))
        checks["local_weights"] = partial(
            ranks_local_norms.check_weights_follow_the_reported_factors, ("zero1 fp32", "zero3 fp32")
        )
    return checks | ranks_error_paths.all_paths(world)


def _all_in(names: dict) -> dict:
    return {n.removeprefix("check_"): f for n, f in names.items() if n.startswith("check_")}


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: (
        True
    )  # torch computes fp16 on any CPU; DeepSpeed asks for instructions
    join_ranks()
    wanted = sys.argv[2:]
    chosen = all_checks(dist.get_world_size())
    run_checks({n: c for n, c in chosen.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
