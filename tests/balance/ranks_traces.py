"""Checks of parameter traces under ZeRO-3: what is fetched and gathered when (see `ranks_balancer.py`)."""

from __future__ import annotations

import contextlib

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from allinone_ds.errors import BalancerError
from tests.balance.engines import (
    CASES,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    run_task,
    toy,
    weights,
)  # fmt: skip


class _Fetches:
    """Counts parameters that a module had to fetch when it ran, because no prefetch had brought them."""

    def __enter__(self) -> _Fetches:
        self.late = 0
        self._before = PartitionedParameterCoordinator._fetch_sub_module_impl

        def counting(coordinator, module, forward, is_leaf, before=self._before):
            params = list(module.parameters(recurse=False))
            self.late += sum(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params)
            return before(coordinator, module, forward, is_leaf)

        PartitionedParameterCoordinator._fetch_sub_module_impl = counting
        return self

    def __exit__(self, *_: object) -> None:
        PartitionedParameterCoordinator._fetch_sub_module_impl = self._before


def check_traces_prefetch_across_tasks() -> None:
    """In steady state nothing is fetched late, in training and in evaluation, and the weights are those without."""
    zero = {**CASES["zero3 fp32"].config()["zero_optimization"], "stage3_param_persistence_threshold": 0}
    after, late = {}, {}
    for traces in (True, False):
        engine = make_engine("zero3 fp32", zero_optimization=zero)
        balancer = make_balancer(engine, task_traces=traces)
        for step in range(5):
            with _Fetches() as fetches:
                for task in toy.TASKS:
                    run_task(balancer, task, step)
                balancer.step()
                engine.eval()
                for task in toy.TASKS:
                    with torch.no_grad(), balancer.evaluation(task):
                        engine(task, inputs(engine, task, 0, 0, 0), True)
                engine.train()
        after[traces], late[traces] = weights(engine), fetches.late
        finish(balancer)
    assert late[False] > 20, late
    assert late[True] == 0, late
    assert largest_change(after[True], after[False]) == 0.0


class _Gathers:
    """Counts elements that are gathered on behalf of forwards and backwards."""

    name = "_PartitionedParameterCoordinator__all_gather_params_"

    def __enter__(self) -> _Gathers:
        self.elements = 0
        self._before = getattr(PartitionedParameterCoordinator, self.name)

        def counting(coordinator, params, *args, before=self._before, **kwargs):
            self.elements += sum(p.ds_numel for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
            return before(coordinator, params, *args, **kwargs)

        setattr(PartitionedParameterCoordinator, self.name, counting)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(PartitionedParameterCoordinator, self.name, self._before)


def check_weights_are_gathered_once_a_step() -> None:
    """As many as the live parameters allow; the others once a pass. The weights are the same, also after a broken task.

    Of 500 elements a prefetch takes 100; the others are the last two layers of the backbone, of 182 each, and a bias.
    """
    base = {**CASES["zero3 fp32"].config()["zero_optimization"], "stage3_param_persistence_threshold": 0}
    for norm in ("exact", "sketch"):
        after, gathered = {}, {}
        for kept, live in (("all", 10**9), ("some", 500), ("none", 10)):
            zero = {**base, "stage3_max_live_parameters": live}
            engine = make_engine("zero3 fp32", zero_optimization=zero)
            balancer = make_balancer(engine, norm=norm)
            for step in range(4):
                with _Gathers() as gathers:
                    for task in toy.TASKS:
                        run_task(balancer, task, step, micro_steps=2)
                    balancer.step()
                assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())
            gathered[kept] = gathers.elements
            with contextlib.suppress(BalancerError), balancer.task("det", 2):
                x = inputs(engine, "det", 4, 0)
                balancer.backward(engine("det", x))  # one micro-step too few
            for task in toy.TASKS:
                run_task(balancer, task, 4)
            balancer.step()
            after[kept] = weights(engine)
            finish(balancer)
        used = sum(p.numel() for n, p in toy.make_model().named_parameters() if n != "backbone.unused")
        assert gathered["all"] <= used + 7, gathered  # `unused` comes with its module
        assert gathered["none"] > 5 * used, gathered
        # 3 tasks of 2 micro-steps, one of which leaves the trace and gathers for its backward too
        assert gathered["none"] - gathered["some"] == 6 * (182 + 182 + 13), gathered
        assert largest_change(after["all"], after["none"]) == largest_change(after["some"], after["none"]) == 0.0
