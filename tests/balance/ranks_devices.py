"""Checks of what matters on accelerators, and of the messages of a step (see `ranks_balancer.py`)."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from allinone_ds import TBGC, Sum
from allinone_ds.balance import self_test
from allinone_ds.zero.engines import pieces
from tests.balance.engines import finish, make_balancer, make_engine, run_task, toy


class _LargestFloat64(TorchDispatchMode):
    """The largest number of float64 elements that any operation inside produces."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                self.numel = max(self.numel, value.numel())
        return result


def check_the_norm_of_the_engines_step_copies_one_parameter_at_a_time() -> None:
    """DeepSpeed computes it in float64."""
    before = pieces.RUN
    for case in ("zero1 fp32", "zero2 fp32", "zero2 bf16 fp32-accumulation", "zero3 fp32"):
        engine = make_engine(case)
        balancer = make_balancer(engine)
        largest_parameter = max(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        pieces.RUN = largest_parameter
        assert max(balancer._adapter.sizes) > largest_parameter, "a group's shard is larger than every parameter"
        for task in toy.TASKS:
            run_task(balancer, task)
        found = _LargestFloat64()
        with found:
            balancer.step()
        assert 0 < found.numel <= largest_parameter, (case, found.numel, largest_parameter)
        adapter = balancer._adapter
        views = [len(adapter.runs(group, torch.empty(size))) for group, size in enumerate(adapter.sizes)]
        assert sum(views) < len(adapter.spans), f"{case}: {views} views of {len(adapter.spans)} parameters: none merged"
        pieces.RUN = before
        finish(balancer)


def check_balancers_share_one_group_of_cpu_messages() -> None:
    for _ in range(2):
        engine = make_engine()
        groups = len(dist.distributed_c10d._world.pg_map)
        balancer = make_balancer(engine)
        finish(balancer)
    assert len(dist.distributed_c10d._world.pg_map) == groups


def check_a_step_that_goes_as_the_one_before_sends_one_message() -> None:
    """Any other step sends one per point: K + 2 per task (here K = 2, ZeRO-2), and two for the step itself."""
    forward, backward, turned = toy.TASKS, toy.TASKS[::-1], (toy.TASKS[0], *toy.TASKS[:0:-1])
    each = len(toy.TASKS) * 4 + 2
    sent = {
        "zero2 fp32": [(forward, each), (forward, 1), (backward, each), (backward, 1), (forward, each), (forward, 1),
                       (turned, 1 + each - 4)],
        "zero3 fp32": [(forward, each), (forward, 1)],
        "zero1 fp32": [(forward, each - len(toy.TASKS)), (forward, 1)],
    }  # fmt: skip
    for case, steps in sent.items():
        balancer = make_balancer(make_engine(case))
        for number, (order, messages) in enumerate(steps):
            before = balancer._agreement._count
            for task in order:
                run_task(balancer, task, number, micro_steps=2)
            balancer.step()
            assert balancer._agreement._count - before == messages, (case, number, balancer._agreement._count - before)
        finish(balancer)


def check_a_step_of_other_tasks_sends_one_message_if_it_is_planned() -> None:
    """And one for the heads that stand still; a part that never ran, or runs otherwise, sends one per point."""
    det, seg, cls = toy.TASKS
    for case in ("zero2 fp32", "zero3 fp32"):
        balancer = make_balancer(make_engine(case))
        steps = [((det, seg), 4 * 2 + 2 + 1), ((seg, det), 1 + 1), ((seg,), 1 + 1), ((seg, cls), 2 * 4 + 2 + 1),
                 ((cls, det), 1 + 1), ((det, seg, cls), 1)]  # fmt: skip
        for number, (tasks, messages) in enumerate(steps):
            before = balancer._agreement._count
            balancer.plan_step([((task,), 2) for task in tasks])
            for task in tasks:
                run_task(balancer, task, number, micro_steps=2)
            assert balancer.step(require_all=False).applied
            assert balancer._agreement._count - before == messages, (case, number, balancer._agreement._count - before)
        balancer.plan_step([((det,), 2)])
        run_task(balancer, seg, micro_steps=2)  # not as planned: an agreement in more messages, and no error
        assert balancer.step(require_all=False).applied
        finish(balancer)


def check_messages_carry_numbers() -> None:
    balancer = make_balancer(make_engine())
    received = [0, -dist.get_rank()]
    balancer.carry(lambda: received)
    for step in range(3):
        received[0] = dist.get_rank() * step
        for task in toy.TASKS:
            run_task(balancer, task, step)
        balancer.step()
        assert balancer.carried == ((dist.get_world_size() - 1) * step, 0)
    finish(balancer)


def check_the_self_test_multiplies_in_float32() -> None:
    """Its limit is that of float32, and a process may have chosen TF32."""
    seen, original = [], self_test.train

    def train(*args):
        seen.append(torch.get_float32_matmul_precision())
        return original(*args)

    self_test.train = train
    torch.set_float32_matmul_precision("medium")
    try:
        finish(make_balancer(make_engine(), self_test=True))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        self_test.train = original
        torch.set_float32_matmul_precision("highest")


def check_16_bit_gradients_get_the_factor_that_is_reported() -> None:
    """The same factor for every element: one of 1/3 that is rounded to bfloat16 moves all weights 0.2 % too far."""
    engine = make_engine("zero2 bf16")
    balancer = make_balancer(engine, TBGC(0.1), norm="delayed")
    for step in range(2):
        for task in toy.TASKS:
            run_task(balancer, task, step)
        balancer.step()
    combiner = balancer._combiner
    index = next(i for i, shared in enumerate(combiner.shared) if shared)
    gradient = torch.linspace(-1, 1, 4096).to(torch.bfloat16)
    combiner.sketcher.add = lambda *_: None
    combiner._task, combiner._turns["det"] = "det", torch.zeros(2, 1)
    combiner.factors["det"] = torch.tensor(1 / 3)
    found = combiner._scale(index, gradient)
    assert (found == (gradient.double() / 3).to(torch.bfloat16)).all()
    combiner._task = None
    finish(balancer)


def check_two_whole_gradients_do_not_exist_at_once() -> None:
    """Handing the scaled sums to the engine may copy them, so that each is forgotten before the next."""
    balancer = make_balancer(make_engine("zero2 bf16"), Sum(), norm="sketch")
    for task in toy.TASKS:
        run_task(balancer, task)
    combiner, left = balancer._combiner, []
    original = combiner.local.set

    def set_and_count(index, gradient):
        left.append(len(combiner._sums))
        original(index, gradient)

    combiner.local.set = set_and_count
    balancer.step()
    assert left and left[: len(left)] == sorted(left, reverse=True) and left[-1] == 0
    finish(balancer)


class _Slow:
    """A collective operation that all ranks wait in for some time, as for a large bucket on a slow link."""

    def __init__(self, looks: int):
        self.looks = looks

    def wait(self, timeout):
        self.looks -= 1
        if self.looks:
            time.sleep(0.03)
            raise RuntimeError("the work is not done")
        return True

    def is_completed(self) -> bool:
        return False


def check_a_slow_reduction_that_all_ranks_wait_in_is_no_error() -> None:
    balancer = make_balancer(make_engine())
    balancer._agreement.wait(_Slow(looks=20))
    dist.barrier()  # as the ranks of an operation are done at about the same time
    for task in toy.TASKS:
        run_task(balancer, task)
    assert balancer.step().applied
    finish(balancer)
