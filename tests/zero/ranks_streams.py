"""Training on an accelerator with streams, where nothing may depend on luck; see `tests.fake_device`.

"Without waits": the waits that this package asks for have no effect, so that what they prevent is seen.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from allinone_ds.balance import balancer as balancer_module
from allinone_ds.testing import exactness
from allinone_ds.testing.cases import WEIGHTINGS
from allinone_ds.zero.engines import base
from allinone_ds.zero.engines.loss_scale import grad_scaler
from tests.balance.engines import CASES, finish, inputs, make_balancer, make_engine, raises, run_case, run_task, toy
from tests.fake_device import WatchedHost, install, record
from tests.launcher import run_checks

QUIET = {"timers": {"throughput": {"enabled": False}}}
ENGINES = [
    "zero0 fp32", "zero2 bf16", "zero3 fp16",
    *(f"zero{stage} fp32 overlap={overlap} contiguous=1" for stage in (1, 2, 3) for overlap in (0, 1)),
    *(f"zero{stage} fp32 offload" for stage in (1, 2, 3)), "zero2 bf16 fp32-accumulation offload",
]  # fmt: skip


@contextlib.contextmanager
def without_waits() -> Iterator[None]:
    record.deaf_to = "allinone_ds"
    yield
    record.deaf_to = ""


def all_checks(world: int) -> list[str]:
    only_on_two = ["check_restored_weights_reach_the_next_forward"]
    return [n for n in globals() if n.startswith("check_") and (world == 2 or n not in only_on_two)]


def check_exact_and_in_order() -> None:
    exactness.STEPS = 3
    for name in ENGINES if dist.get_world_size() == 1 else [ENGINES[2], CASE_3]:
        record.clear()
        found = run_case(CASES[name], WEIGHTINGS["tbgc"], (1, 2, 1))
        limit = 2e-6 if " fp32" in name[:10] else 1e-2
        assert found["weights_relative"] <= 2 * limit and found["norms"] <= limit, (name, found)
        assert not record.disorder(), (name, record.disorder())


def check_several_accelerators_are_tested_before_they_train() -> None:
    engine = make_engine("zero2 fp32", **QUIET)
    found, run = [], balancer_module.run_self_test
    balancer_module.run_self_test = lambda *arguments: found.append(run(*arguments))
    for asked in (None, False):
        finish(make_balancer(engine, self_test=asked))
    balancer_module.run_self_test = run
    assert len(found) == (dist.get_world_size() > 1) and all(difference < 1e-4 for difference in found), found


def check_the_throughput_timer_waits_for_the_device() -> None:
    for options, waits in (({}, True), (QUIET, False)):
        balancer = make_balancer(make_engine("zero2 fp32", **options))
        for _ in range(3):  # it does not measure the first two
            step(balancer)
        record.clear()
        step(balancer)
        assert bool(record.waits("deepspeed")["deepspeed/utils/timer.py"]) == waits
        finish(balancer)


def check_overlapped_reductions_wait_for_the_device_once_per_backward() -> None:
    for overlap in (0, 1):
        balancer = make_balancer(make_engine(f"zero2 fp32 overlap={overlap} contiguous=1", **QUIET))
        step(balancer)
        gc.collect()  # an earlier engine waits when it ends
        record.clear()
        for task in toy.TASKS:
            run_task(balancer, task, micro_steps=2)
        assert record.waits("deepspeed")["deepspeed/runtime/zero/stage_1_and_2.py"] == overlap * 2 * len(toy.TASKS)
        balancer.step()
        finish(balancer)


class _Breaks(torch.autograd.Function):
    """Raises in backward, when the gradients of later layers are on their way already."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("broken")


def broken_task(case: str) -> list[str]:
    """Break a backward, run the task again, and return what had no order."""
    balancer = make_balancer(make_engine(case, **QUIET))
    run_task(balancer, "det")
    hook = balancer.engine.module.backbone.stem.register_forward_hook(lambda module, args, x: _Breaks.apply(x))
    record.clear()
    raises(KeyError, "broken", lambda: run_task(balancer, "seg"))
    hook.remove()
    for task in ("seg", "cls"):
        run_task(balancer, task)
    balancer.step()
    found = record.disorder()
    finish(balancer)
    return found


def check_gradients_of_a_broken_backward_are_dropped_after_their_reduction() -> None:
    with without_waits():
        assert any("zero_ at allinone_ds/zero/engines/stage3.py" in f for f in broken_task(CASE_3))
    for case in (CASE_3, "zero1 fp32 overlap=1 contiguous=1", "zero2 fp32 overlap=1 contiguous=1"):
        assert not broken_task(case)


CASE_3 = "zero3 fp32 overlap=1 contiguous=1"


def overflow() -> list[str]:
    balancer = make_balancer(make_engine("zero3 fp16", **QUIET))
    record.clear()
    for task in toy.TASKS:
        run_task(balancer, task, factor=1e30 if task == "det" else 1.0)
    assert balancer.step().overflow
    found = record.disorder()
    finish(balancer)
    return found


def check_zero3_sees_an_overflow_that_is_shown_to_it() -> None:
    with without_waits():
        assert any("allinone_ds/zero/engines/stage3.py" in f for f in overflow())
    assert not overflow()


def restored() -> list[str]:
    """Take steps without a task, whose head is put back, then steps that gather all weights at once."""
    zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10**6}
    config = {**CASES["zero3 fp32"].config()["zero_optimization"], **zero}
    balancer = make_balancer(make_engine("zero3 fp32", "adamw", zero_optimization=config, **QUIET))
    engine = balancer.engine
    batches = {task: inputs(engine, task, 0, 0) for task in toy.TASKS}
    record.clear()
    for number in range(6):
        for task in toy.TASKS[:2] if number % 2 else reversed(toy.TASKS):
            with balancer.task(task):
                balancer.backward(engine(task, batches[task], True))
        balancer.step(require_all=False)
    found = record.disorder()
    finish(balancer)
    return found


def check_restored_weights_reach_the_next_forward() -> None:
    with without_waits():
        assert any("allinone_ds/zero/engines/base.py" in f for f in restored())
    assert not restored()


def offloaded(name: str) -> list[str]:
    """Take steps with page-locked gradients on the host, and return what was used before it had arrived."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    config = {**CASES[name].config()["zero_optimization"], **offload}
    balancer = make_balancer(make_engine(name, zero_optimization=config, **QUIET))
    combiner = balancer._combiner
    combiner.add, combiner.hand_over = WatchedHost.around(combiner.add), WatchedHost.around(combiner.hand_over)
    record.clear()
    for _ in range(2):
        step(balancer)
    found = record.disorder()
    finish(balancer)
    return found


def check_offloaded_gradients_are_used_after_their_copy() -> None:
    from allinone_ds.zero.engines import stage12

    wait = stage12.wait_for_offload_copies
    stage12.wait_for_offload_copies = lambda optimizer: None
    found = offloaded("zero2 fp32 offload")
    stage12.wait_for_offload_copies = wait
    assert any("allinone_ds/" in f and "copy at deepspeed" in f for f in found), found
    for name in (*(f"zero{stage} fp32 offload" for stage in (1, 2, 3)), "zero2 bf16 fp32-accumulation offload"):
        assert not offloaded(name), (name, offloaded(name))


def scaled(stage: int) -> list[str]:
    """Take steps with a loss scale and an offloaded optimizer; return what the host used before it had arrived."""
    balancer = make_balancer(make_engine(f"zero{stage} torch_autocast fp16 offload", **QUIET))
    scaler = grad_scaler(balancer.engine)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})
    balancer.engine.step = WatchedHost.around(balancer.engine.step)
    record.clear()
    for _ in range(2):
        step(balancer)
    found = [str(finding) for finding in record.findings if finding.kind == "race"]
    finish(balancer)
    return found


def check_an_offloaded_step_does_not_use_the_loss_scale_before_it_has_arrived() -> None:
    for stage in (1, 2, 3):
        mended = base.scale_changes_after_step
        base.scale_changes_after_step = contextlib.nullcontext
        assert any("_amp_foreach_non_finite_check_and_unscale_" in f for f in scaled(stage)), stage
        base.scale_changes_after_step = mended
        assert not scaled(stage), (stage, scaled(stage))


def step(balancer) -> None:
    for task in toy.TASKS:
        run_task(balancer, task)
    balancer.step()


if __name__ == "__main__":
    install()
    run_checks({name: globals()[name] for name in all_checks(int(sys.argv[2]))}, sys.argv[1])
