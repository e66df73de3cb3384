"""Checks of joint blocks and of counted labels on engines; started by test_joint.py.

The reference is one process in float64 that takes the mean over all labels of all ranks and micro-steps.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from allinone_ds import TBGC, Sum, TaskBalancer
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance import joint_forwards, joint_labels, joint_misuse
from tests.balance.engines import finish
from tests.balance.joint_model import CASES, TASKS, WEIGHTINGS, batch, compare, compare_features, make_engine, reference
from tests.launcher import join_ranks, run_checks


def check_joint_at_the_backbone_equals_one_process() -> None:
    for case in CASES:
        for name in ("tbgc", "gram") if case.dtype == "fp32" else ("tbgc",):
            compare(case, name, 1, "all", False, False)
            compare(case, name, 2, "some", True, False)


def check_joint_at_the_features_equals_one_process() -> None:
    for case in CASES:
        for name in WEIGHTINGS if case.dtype == "fp32" and not case.offload else ("tbgc",):
            compare_features(case, name, 1, "all", False, False)
            compare_features(case, name, 2, "some", True, False)
    for case in CASES[:4]:
        compare_features(case, "tbgc", 2, "missing", True, none=case.stage < 3)


def check_joint_and_task_blocks_mix() -> None:
    """A task of its own beside a joint block gives the step of three tasks of their own."""
    for case in (*CASES[:4], CASES[4]):
        results = []
        for way in ("tasks", "backbone", "features"):
            weighting = Sum() if way == "features" else TBGC(max_norm=0.05)
            engine = make_engine(case)
            balancer = TaskBalancer(engine, tuple(TASKS), "backbone", weighting)
            for step in range(2):
                x, chosen = batch(step, 0, dist.get_rank(), "all")
                if way == "tasks":
                    for task in TASKS:
                        with balancer.task(task):
                            balancer.backward(engine(x.float(), chosen, False)[task])
                else:
                    with balancer.task("b"):
                        balancer.backward(engine(x.float(), {"b": chosen["b"]}, False)["b"])
                    with balancer.joint(("c", "a"), at=way):
                        losses = engine(x.float(), {t: chosen[t] for t in "ac"}, False)
                        balancer.backward(losses)
                report = balancer.step()
            assert report.tasks == tuple(TASKS) and report.applied
            results.append({n: whole_master(engine, p) for n, p in engine.module.named_parameters()})
            finish(balancer)
        assert all(float((results[0][n] - v).abs().max()) < 1e-6 for n, v in results[1].items()), case.name
        plain, _ = reference(case, WEIGHTINGS["sum"][1], "same", 2, 1, "all", False)
        assert all(float((plain[n] - v).abs().max()) < 1e-5 for n, v in results[2].items()), case.name


def check_the_order_of_the_losses_does_not_matter() -> None:
    """Also with labels that are missing, and in a block whose tasks are named in yet another order."""
    for at in ("backbone", "features"):
        results = []
        for order in (("a", "b", "c"), ("c", "a", "b")):
            engine = make_engine(Case("zero2", 2))
            balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))
            with balancer.joint(order if at == "features" else TASKS, 2, at=at):
                for k in range(2):
                    x, chosen = batch(0, k, dist.get_rank(), "missing")
                    losses = engine(x.float(), {t: chosen[t] for t in order}, True)
                    balancer.backward(losses, {t: int(chosen[t].sum()) for t in reversed(order)})
            assert balancer.step().applied
            results.append({n: whole_master(engine, p) for n, p in engine.module.named_parameters()})
            finish(balancer)
        assert all(float((results[0][n] - v).abs().max()) < 1e-7 for n, v in results[1].items()), at


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    join_ranks()
    wanted = sys.argv[2:]
    everything = {**globals(), **vars(joint_labels), **vars(joint_misuse), **vars(joint_forwards)}
    checks = {n.removeprefix("check_"): f for n, f in everything.items() if n.startswith("check_")}
    run_checks({n: c for n, c in checks.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
