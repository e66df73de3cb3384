"""Where this package makes the host wait for the device; see `tests.fake_device`. Started by test_host_waits.py."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torchjd import aggregation

from allinone_ds import (
    DBMTL,
    DWA,
    FAMO,
    TBGC,
    GlobalClip,
    GradNorm,
    RandomWeights,
    Uncertainty,
    task_features,
    weighting_from_config,
)
from allinone_ds.data.loading.ahead import to_device
from tests.balance.engines import finish, inputs, make_balancer, make_engine, toy
from tests.fake_device import install, record
from tests.launcher import run_checks
from tests.tasks import heads, kinds
from tests.tasks.dense import tiny as dense
from tests.tiny import samples

T = len(toy.TASKS)
QUIET = {"timers": {"throughput": {"enabled": False}}}


def waits_in_a_step(
    case: str = "zero2 fp32", tasks=toy.TASKS, joint: str = "", weighting=None, owner="allinone_ds", **options
):
    """File -> waits of a package in the fourth step of two micro-steps per task; nothing may be out of order after."""
    balancer = make_balancer(make_engine(case, **QUIET), weighting, **options)
    engine = balancer.engine
    engine.module.mark = task_features
    batches = {task: inputs(engine, task, 0, 0) for task in toy.TASKS}
    for number in range(4):
        record.clear()
        ran = toy.TASKS if number < 3 else tasks
        if joint:
            with balancer.joint(ran, 2, at=joint):
                for k in range(2):
                    balancer.backward(engine(ran, batches[ran[0]], k == 1), dict.fromkeys(ran, 3))
        for task in () if joint else ran:
            with balancer.task(task, 2):
                for k in range(2):
                    balancer.backward(engine(task, batches[task], k == 1))
        balancer.step(require_all=False)
    found = record.waits(owner)
    assert not record.disorder(), record.disorder()
    finish(balancer)
    return found


def at_most(found: Counter[str], waits: int, **more: int) -> None:
    """`waits` of the balancer, and `more`, by the last part of the file's name, with their reasons in docs/gpu.md."""
    allowed = Counter({"base": waits}) + Counter(more)
    counted = Counter({file.rpartition("/")[2].removesuffix(".py"): count for file, count in found.items()})
    assert counted <= allowed, (found, allowed)


def check_a_step_waits_for_the_verdict_only() -> None:
    for case in ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero2 bf16", "zero2 fp16", "zero1 bf16 fp32-accumulation",
                 "zero3 fp32"):  # fmt: skip
        at_most(waits_in_a_step(case), 1)
    for options in ({"norm": "sketch"}, {"norm": "delayed"}, {"cosines_every": 1}, {"parallel": "tasks"},
                    {"joint": "backbone"}, {"tasks": toy.TASKS[:2]}, {"weighting": GlobalClip(0.1)},
                    {"weighting": Uncertainty()}):  # fmt: skip
        at_most(waits_in_a_step(**options), 1)


def check_weightings_that_see_all_tasks_wait_once_too() -> None:
    for weighting in (TBGC(0.1, target="mean"), DBMTL(), GradNorm(), DWA(), FAMO(), RandomWeights()):
        at_most(waits_in_a_step(weighting=weighting), 1)
    for options in ({"norm": "delayed"}, {"parallel": "tasks"}, {"tasks": toy.TASKS[:2]}):
        at_most(waits_in_a_step(weighting=DBMTL(), **options), 1)


def check_methods_of_torchjd_get_their_matrix_with_the_verdict() -> None:
    for name in ("UPGradWeighting", "AlignedMTLWeighting", "IMTLGWeighting"):
        at_most(waits_in_a_step(weighting=getattr(aggregation, name)()), 1)
    for options in ({"norm": "delayed"}, {"parallel": "tasks"}):
        at_most(waits_in_a_step(weighting=aggregation.CAGradWeighting(c=0.4), **options), 1)
    at_most(waits_in_a_step(weighting=weighting_from_config({"name": "nash_mtl", "n_tasks": T})), 1)


def check_blocks_that_balance_at_the_features_do_not_wait() -> None:
    """Except where all tasks must be known on the CPU, in each of the two micro-steps."""
    at_most(waits_in_a_step(joint="features"), 1)
    at_most(waits_in_a_step(joint="features", weighting=DBMTL()), 1, block=2)


def check_an_offloaded_optimizer_waits_for_the_factor_of_each_task() -> None:
    for stage in (2, 3):
        at_most(waits_in_a_step(f"zero{stage} fp32 offload"), 1, exact=T)
    at_most(waits_in_a_step("zero2 fp32 offload", weighting=TBGC(0.1, target="mean")), 1)
    at_most(waits_in_a_step("zero3 fp32 offload", weighting=aggregation.UPGradWeighting()), 1)


def check_gradients_in_fp32_are_offloaded_as_a_whole() -> None:
    """So DeepSpeed never waits; where gradients do not add up in fp32 it waits for each parameter."""
    case = "zero2 bf16 fp32-accumulation offload"
    at_most(waits_in_a_step(case), 1, stage12=T, exact=T)
    assert not waits_in_a_step(case, owner="deepspeed")
    by_parameter = waits_in_a_step("zero2 bf16 offload", owner="deepspeed")
    assert sum(by_parameter.values()) > 2 * len(list(toy.make_model().parameters()))


def check_weights_that_are_put_back_are_ordered_without_a_wait() -> None:
    for case in ("zero2 fp32", "zero3 fp32"):
        at_most(waits_in_a_step(case, tasks=toy.TASKS[:2]), 1)


def pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: pinned(part) for key, part in value.items()}
    return type(value)(pinned(part) for part in value) if isinstance(value, list | tuple) else value


def waits_in_a_micro_step(model, name: str, made: list) -> Counter[str]:
    """File -> waits in the second of two micro-steps, from the collated batch on."""
    model.to("fake")
    batch = pinned(model.tasks[name].collate(made))
    for _ in range(2):
        record.clear()
        model(task=name, **to_device(batch, torch.device("fake:0"))).loss.backward()
    assert not record.disorder(), (name, record.disorder())
    return record.waits()


MORE_HEADS = {
    "mask2former": {"mask2former": 1},  # the classes in the label maps
    "supcon": {"embedding": 1},  # images without an identity
}
"""Head -> file -> waits of a micro-step of four images."""


def check_heads_do_not_wait() -> None:
    for head in heads.HEADS:
        model, name, _ = heads.build(head)
        at_most(waits_in_a_micro_step(model, name, samples()), 0, **MORE_HEADS.get(head, {}))


def check_heads_of_objects_and_vectors_do_not_wait() -> None:
    for kind in kinds.KINDS:
        found = waits_in_a_micro_step(kinds.kind_model(kind), kind, kinds.kind_samples(kind=kind))
        at_most(found, 0, **MORE_HEADS.get(kind, {}))


def check_heads_of_maps_do_not_wait() -> None:
    for head in dense.HEADS:
        model, _ = dense.build(head)
        at_most(waits_in_a_micro_step(model, "map", dense.dense_samples()), 0)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}

if __name__ == "__main__":
    install()
    run_checks(CHECKS, sys.argv[1])
