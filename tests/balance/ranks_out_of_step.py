"""Loops in which one rank does something that the others do not; started once per loop by test_out_of_step.py.

Every rank writes what it saw to a file of its own, since ranks that were out of step share no collective any more.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from allinone_ds import TBGC, TaskBalancer, Weighting
from allinone_ds.balance.agreement import notices, protocol
from allinone_ds.errors import BalancerError
from tests.balance.engines import CASES, inputs, make_engine, run_task, toy
from tests.launcher import join_ranks


def forward(balancer: TaskBalancer, task: str, step: int = 0) -> torch.Tensor:
    x = inputs(balancer.engine, task, step, 0)
    return balancer.engine(task, x, True)


def step_of(balancer: TaskBalancer, tasks: tuple[str, ...] = toy.TASKS) -> None:
    for task in tasks:
        run_task(balancer, task)
    balancer.step()


def swallowed(balancer: TaskBalancer, mine: bool, before: bool) -> None:
    """An exception in a task, before or after its forward, that the loop swallows."""
    for task in toy.TASKS:
        try:
            with balancer.task(task):
                if before and mine and task == "seg":
                    raise ValueError("a bad sample")
                loss = forward(balancer, task)
                if mine and task == "seg":
                    raise ValueError("a bad sample")
                balancer.backward(loss)
        except ValueError:
            pass
    balancer.step()


def in_hook(balancer: TaskBalancer, mine: bool) -> None:
    """An exception in the middle of a backward."""
    param = balancer.engine.module.backbone.blocks[1].weight
    for task in toy.TASKS:
        try:
            with balancer.task(task):
                loss = forward(balancer, task)
                if mine and task == "seg":
                    param.register_hook(lambda g: (_ for _ in ()).throw(ValueError("a bad hook")))
                balancer.backward(loss)
        except ValueError:
            pass
    balancer.step()


def in_layer(balancer: TaskBalancer, mine: bool) -> None:
    """An exception in the middle of a forward."""
    if mine:

        def bad(*_):
            if balancer._running is not None and balancer._running.name == "seg":
                raise ValueError("a bad layer")

        balancer.engine.module.backbone.blocks[1].register_forward_pre_hook(bad)
    swallowed(balancer, False, False)


def after_backward(balancer: TaskBalancer, mine: bool) -> None:
    for task in toy.TASKS:
        try:
            with balancer.task(task):
                balancer.backward(forward(balancer, task))
                if mine and task == "seg":
                    raise ValueError("a bad metric")
        except ValueError:
            pass
    balancer.step()


def too_few(balancer: TaskBalancer, mine: bool) -> None:
    """A loader of one rank that ends too early."""
    with balancer.task("det", micro_steps=2):
        for _ in range(1 if mine else 2):
            balancer.backward(forward(balancer, "det"))


def too_many(balancer: TaskBalancer, mine: bool) -> None:
    with balancer.task("det"):
        for _ in range(2 if mine else 1):
            balancer.backward(forward(balancer, "det"))


def other_micro_steps(balancer: TaskBalancer, mine: bool) -> None:
    run_task(balancer, "det", micro_steps=2 if mine else 1)


def other_order(balancer: TaskBalancer, mine: bool) -> None:
    step_of(balancer, toy.TASKS[::-1] if mine else toy.TASKS)


def skips_task(balancer: TaskBalancer, mine: bool) -> None:
    step_of(balancer, ("det", "cls") if mine else toy.TASKS)


def steps_early(balancer: TaskBalancer, mine: bool) -> None:
    step_of(balancer, ("det", "seg") if mine else toy.TASKS)


def partial_step(balancer: TaskBalancer, mine: bool) -> None:
    for task in toy.TASKS[:2]:
        run_task(balancer, task)
    balancer.step(require_all=not mine)


def steps_inside(balancer: TaskBalancer, mine: bool) -> None:
    with balancer.task("det"):
        if mine:
            balancer.step()
        balancer.backward(forward(balancer, "det"))


def abandons(balancer: TaskBalancer, mine: bool) -> None:
    run_task(balancer, "det")
    if mine:
        balancer.abandon()
        run_task(balancer, "det")
    step_of(balancer, ("seg", "cls"))


def detaches(balancer: TaskBalancer, mine: bool) -> None:
    run_task(balancer, "det")
    if mine:
        balancer.detach()
        return
    step_of(balancer, ("seg", "cls"))


def leaves(balancer: TaskBalancer, mine: bool) -> None:
    """A rank whose process ends without an error; as far as it knows, all is well."""
    run_task(balancer, "det")
    if mine:
        write("left")
        os._exit(0)
    step_of(balancer, ("seg", "cls"))


def stays_away(balancer: TaskBalancer, mine: bool) -> None:
    """A rank that is busy elsewhere; the others warn, and give up after a time."""
    protocol.WARNING, protocol.WITHIN_STEP = 0.3, 1.0
    run_task(balancer, "det")
    while mine and not _file(0).exists():
        time.sleep(0.05)
    if not mine:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run_task(balancer, "seg")
            except BalancerError as error:
                for warning in caught:
                    error.add_note(str(warning.message))
                raise


class RaisesOnce(Weighting):
    """Raises on one rank."""

    streams = False

    def __init__(self, mine: bool):
        self.mine = mine

    def factors(self, record):
        if self.mine:
            self.mine = False
            raise ZeroDivisionError("of the weighting")
        return torch.full((len(record.tasks),), 1e-3)


def weighting(balancer: TaskBalancer, mine: bool) -> None:
    balancer.weighting.mine = mine
    step_of(balancer)


def thaws(balancer: TaskBalancer, mine: bool) -> None:
    if mine:
        balancer.engine.module.backbone.frozen.weight.requires_grad_(True)
    step_of(balancer)


LOOPS = {
    "an exception before the forward": lambda b, m: swallowed(b, m, before=True),
    "an exception after the forward": lambda b, m: swallowed(b, m, before=False),
    "an exception in a layer": in_layer,
    "an exception in a hook": in_hook,
    "an exception after the backward": after_backward,
    "too few micro-steps": too_few, "too many micro-steps": too_many, "other micro-steps": other_micro_steps,
    "other order": other_order, "skips a task": skips_task, "steps early": steps_early, "partial step": partial_step,
    "steps inside": steps_inside, "abandons": abandons, "detaches": detaches, "leaves": leaves,
    "stays away": stays_away, "a weighting that raises": weighting, "thaws": thaws,
}  # fmt: skip


def _file(rank: int) -> Path:
    return Path(f"{sys.argv[1]}.{rank}")


def write(kind: str, message: str = "", notes: list[str] | None = None) -> None:
    """Write how this rank's loop ended."""
    unfinished = Path(f"{_file(dist.get_rank())}.unfinished")
    unfinished.write_text(json.dumps([kind, message, notes or []]))
    unfinished.rename(_file(dist.get_rank()))


def main() -> None:
    """Run one loop; rank 0 writes the error, its message and its notes that ended the loop of each rank."""
    name, case, norm, good_steps = sys.argv[2:6]
    protocol.POLL, protocol.GRACE, notices.ANSWER = 0.1, 0.5, 0.5
    join_ranks()
    world = dist.get_world_size()
    mine = dist.get_rank() == world - 1
    every = {task: tuple(range(world)) for task in toy.TASKS}
    apart = {"parallel": "tasks", "groups": every} if CASES[case].apart else {}
    weighting = RaisesOnce(False) if name == "a weighting that raises" else TBGC(0.1)
    balancer = TaskBalancer(make_engine(case), toy.TASKS, "backbone", weighting, norm=norm, **apart)
    try:
        for _ in range(int(good_steps)):
            step_of(balancer)
        LOOPS[name](balancer, mine)
        write("nothing was raised")
    except Exception as error:
        write(type(error).__name__, str(error), getattr(error, "__notes__", []))
    while not all(_file(rank).exists() for rank in range(world)):
        time.sleep(0.05)  # a rank that ended would tell the others by its end
    if dist.get_rank() == 0:
        results = {rank: json.loads(_file(rank).read_text()) for rank in range(world)}
        Path(sys.argv[1]).write_text(json.dumps(results))
    os._exit(0)


if __name__ == "__main__":
    main()
