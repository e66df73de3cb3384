"""Checks of every weighting on an engine, in any order of tasks and without some (see `ranks_balancer.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torchjd.aggregation as torchjd

from allinone_ds import StepRecord, Weighting, weighting_from_config
from allinone_ds.balance.options import TORCHJD, WEIGHTINGS
from allinone_ds.errors import ConfigError
from allinone_ds.testing.reference import gradients
from tests.balance.engines import finish, make_balancer, make_engine, raises, run_task, toy

ORDERS = (("det", "seg", "cls"), ("cls", "det", "seg"), ("seg", "det"), ("cls",), ("seg", "cls", "det"), ("cls", "seg"))
OPTIONS = {
    "static": {"weights": {"cls": 3.0, "det": 1.0, "seg": 0.5}}, "gradnorm": {"lr": 0.1}, "db_mtl": {"beta": 0.5},
    "dwa": {"window": 10}, "cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}, "nash_mtl": {"n_tasks": 3},
    "upgrad": {"pref_vector": [0.5, 0.2, 0.3]}, "dualproj": {"pref_vector": [0.5, 0.2, 0.3]},
    "aligned_mtl": {"pref_vector": [0.5, 0.2, 0.3]}, "tbgc": {"target": "mean"},
}  # fmt: skip


def made(name: str) -> Weighting:
    weighting = weighting_from_config({"name": name, **OPTIONS.get(name, {})})
    weighting.check_tasks(toy.TASKS)
    return weighting


def records(world: int, orders: Sequence[tuple[str, ...]] = ORDERS) -> list[StepRecord]:
    """Records of the steps in the declared order, from gradients in float64 on one process."""
    model, found = toy.make_model(), []
    for step, ran in enumerate(orders):
        tasks = tuple(task for task in toy.TASKS if task in ran)
        each = [gradients(model, task, step, 1, world) for task in tasks]
        names = [name for name, p in model.named_parameters() if name.startswith("backbone.") and p.requires_grad]
        rows = [torch.cat([g[n].reshape(-1) for n in names if n in g]) for g in each]
        whole = torch.stack([torch.cat([v.reshape(-1) for v in g.values()]).norm() for g in each])
        losses = []
        for task in tasks:
            each_loss = [model(task, toy.inputs(task, step, 0, rank), True).detach() for rank in range(world)]
            losses.append(torch.stack(each_loss).mean())
        jacobian = torch.stack(rows)
        found.append(StepRecord(tasks, jacobian @ jacobian.T, whole, torch.stack(losses).float()))
    return found


def wanted_factors(weighting: Weighting, record: StepRecord) -> Iterable[float]:
    if not weighting.streams:
        return weighting.factors(record).tolist()
    return [
        float(weighting.factors(StepRecord((task,), record.gram[i : i + 1, i : i + 1], record.whole_norms[i : i + 1],
                                           record.losses[i : i + 1])))
        for i, task in enumerate(record.tasks)
    ]  # fmt: skip


def check_every_weighting_follows_its_tasks_in_any_order_and_without_some() -> None:
    """Norms are exact and the weights stay, so each factor is known: that of the method on float64's Gram matrix."""
    wanted_records = records(dist.get_world_size())
    engine = make_engine("zero2 fp32", lr=0.0)
    for name in (*WEIGHTINGS, *TORCHJD):
        balancer, alone = make_balancer(engine, made(name)), made(name)
        for step, (order, record) in enumerate(zip(ORDERS, wanted_records, strict=True)):
            for task in order:
                run_task(balancer, task, step)
            torch.manual_seed(step)  # some methods draw from torch's generator
            report = balancer.step(require_all=False)
            torch.manual_seed(step)
            wanted = dict(zip(record.tasks, wanted_factors(alone, record), strict=True))
            if name == "global_clip":
                continue  # its factor is that of the sum
            for task, factor in wanted.items():
                got = float(report.scales[task])
                assert abs(got - factor) <= 2e-3 * max(map(abs, wanted.values())), (name, step, order, got, wanted)
            assert report.tasks == record.tasks, (name, step)
        balancer.detach()
    engine.destroy()


def check_a_task_that_is_not_finite_leaves_methods_of_all_tasks_usable() -> None:
    """Factors, and what a method remembers, are those of a step without the task."""
    engine = make_engine("zero2 fp32", lr=0.0)
    wanted_records = records(dist.get_world_size(), [("det", "cls"), toy.TASKS])
    methods = {name: (made(name), made(name)) for name in (*WEIGHTINGS, *TORCHJD) if not made(name).streams}
    methods["refuses nan"] = RefusesNan(), RefusesNan()
    for name, (own, alone) in methods.items():
        balancer = make_balancer(engine, own)
        for step, record in enumerate(wanted_records):
            for task in toy.TASKS:
                run_task(balancer, task, step, factor=float("nan") if task == "seg" and step == 0 else 1.0)
            torch.manual_seed(step)
            before = torch.get_rng_state()
            report = balancer.step()
            torch.set_rng_state(before)
            wanted = dict(zip(record.tasks, wanted_factors(alone, record), strict=True))
            assert report.skipped == (("seg",) if step == 0 else ()) and report.applied, (name, step)
            for task, factor in wanted.items():
                got = float(report.scales[task])
                assert abs(got - factor) <= 2e-3 * max(map(abs, wanted.values())), (name, step, got, wanted)
        balancer.detach()
    engine.destroy()


class RefusesNan(Weighting):
    """A method of all tasks that remembers a norm, and raises for a matrix that is not finite, as solvers do."""

    streams = False

    def __init__(self) -> None:
        self._norm = torch.zeros(())

    def factors(self, record: StepRecord) -> torch.Tensor:
        self._norm = self._norm + record.norms.max()
        if not torch.isfinite(record.gram).all():
            raise ValueError("not finite")
        return record.norms / self._norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"norm": self._norm}

    def load_state_dict(self, state) -> None:
        self._norm = state["norm"]


def check_numbers_per_task_are_counted_at_construction() -> None:
    engine = make_engine()
    for weighting, text in (
        (torchjd.UPGradWeighting(torch.ones(2)), "pref_vector has 2 numbers, and there are 3 tasks (det, seg, cls)"),
        (torchjd.ConstantWeighting(torch.ones(4)), "weights has 4 numbers"),
        (weighting_from_config({"name": "nash_mtl", "n_tasks": 2}), "n_tasks = 2, and there are 3 tasks"),
    ):
        raises(ValueError, text, partial(make_balancer, engine, weighting))
    raises(ConfigError, "needs the option alpha", lambda: weighting_from_config({"name": "fairgrad"}))
    balancer = make_balancer(engine)  # a refusal leaves nothing on the engine
    for task in toy.TASKS:
        run_task(balancer, task)
    assert balancer.step().applied
    finish(balancer)
