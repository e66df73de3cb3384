"""Trains the toy model on an engine with a balancer, and compares weights, norms and factors with the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allinone_ds.testing import toy
from allinone_ds.testing.cases import GROUPS, STEPS, Case
from allinone_ds.testing.muon import MuonByHand, muon, newton_schulz_in_float32
from allinone_ds.testing.reference import ByTorch, Reference, reference_run

ADAMW: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}
"""Its eps is large, so that a gradient of zero which is not quite zero does not move a weight."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    engine: Any,
    balancer: Any,
    counts: Mapping[str, int],
    steps: int,
    divisions: Sequence[Any] = (),
    joint_at: str | None = None,
) -> list[Any]:
    """Train the toy model; return the report of each step. Collective.

    Args:
        engine: holds a `ToyModel`.
        balancer: a `TaskBalancer` on it.
        counts: task -> micro-steps of one rank, where every rank runs every task.
        steps: optimizer steps.
        divisions: of the ranks among the tasks, taken in turns, one per step; empty: the balancer's own.
        joint_at: run all tasks in a joint block, balanced there, on the data of the first; None: in blocks of their own
    """
    dtype = next(engine.module.parameters()).dtype
    reports = []
    for step in range(steps):
        if joint_at:
            count = counts[toy.TASKS[0]]
            with balancer.joint(toy.TASKS, count, at=joint_at):
                for k in range(count):
                    x = toy.inputs(toy.TASKS[0], step, k, dist.get_rank()).to(engine.device, dtype)
                    balancer.backward(engine(toy.TASKS, x, k == count - 1))
            reports.append(balancer.step())
            continue
        if divisions:
            balancer.regroup(divisions[step % len(divisions)])
        for task in balancer.tasks:
            mine = balancer.share(task, counts[task])
            with balancer.task(task, micro_steps=len(mine)):
                for k, rank in mine:
                    x = toy.inputs(task, step, k, rank).to(engine.device, dtype)
                    balancer.backward(engine(task, x, k == counts[task] - 1))
        reports.append(balancer.step())
    return reports


def compare(
    weights: Mapping[str, Tensor], reports: Sequence[Any], wanted: Reference, start: toy.ToyModel
) -> dict[str, Any]:
    """Return the largest differences from the reference.

    Args:
        weights: name -> whole trained parameter, float64.
        reports: of each step.
        wanted: what training must reach.
        start: the model before training.

    Returns:
        "weights" (absolute), "weights_relative" (to the largest change of a weight), "norms" and "scales" (both
        relative), and "overflows", the number of steps that overflowed.
    """
    largest = max(float((wanted.params[name] - p.detach()).abs().max()) for name, p in start.named_parameters())
    worst = max(float((value - wanted.params[name]).abs().max()) for name, value in weights.items())
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        worst = float("nan")
    return {
        "weights": worst,
        "weights_relative": worst / largest,
        "norms": _largest_ratio([report.norms for report in reports], wanted.norms),
        "scales": _largest_ratio([report.scales for report in reports], wanted.scales),
        "overflows": sum(report.overflow for report in reports),
    }


def run_case(
    case: Case,
    weighting: Mapping[str, Any],
    micro_steps: Sequence[int],
    make_balancer: Callable[..., Any],
    whole_master: Callable[[Any, Any], Tensor],
) -> dict[str, Any]:
    """Train on one engine and compare with the reference; return the differences (see `compare`). Collective.

    Args:
        case: the engine.
        weighting: as in a run's `balancer:` block.
        micro_steps: one number per task.
        make_balancer: (engine, weighting, parallel="data" or "tasks", norm="exact" or "features") -> balancer; it
            marks the features of the model.
        whole_master: (engine, parameter) -> the fp32 weight that the optimizer steps on, whole, as float64.
    """
    import deepspeed
    from deepspeed.runtime import torch_autocast

    world = dist.get_world_size()
    counts = dict(zip(toy.TASKS, micro_steps, strict=True))
    if case.joint_at:
        counts = dict.fromkeys(toy.TASKS, micro_steps[-1])
    lr = toy.rate(weighting) * case.rate
    head_lr = toy.RAW_RATE if case.at == "features" else None  # their gradient is raw
    model = toy.make_model(checkpointing=bool(case.checkpointing)).float()
    groups = toy.param_groups(model, not case.one_group, head_lr if case.optimizer == "sgd" else None)
    adam = {**ADAMW, "lr": ADAMW["lr"] * case.rate}
    optimizer = _optimizer(case.optimizer, model, groups, lr, adam)
    config = case.config()
    if case.checkpointing == "deepspeed":
        deepspeed.checkpointing.configure(None, deepspeed_config=config)
        model.backbone.checkpoint = deepspeed.checkpointing.checkpoint
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    owners = (engine.optimizer, "torch_autocast_gradscaler"), (engine, "torch_autocast_z0_gradscaler")
    scaler = next((found for found in (getattr(*owner, None) for owner in owners) if found is not None), None)
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})  # the losses differ by 3,000
    options = {"parallel": "tasks" if case.apart else "data", **({} if case.norm == "exact" else {"norm": case.norm})}
    balancer = make_balancer(engine, weighting, **options)
    with newton_schulz_in_float32() if "muon" in case.optimizer else contextlib.nullcontext():
        reports = train(engine, balancer, counts, STEPS, GROUPS[world] if case.apart else (), case.joint_at)
    dtype = torch.float64 if case.dtype == "fp32" else DTYPES[case.dtype]
    by_hand = (
        None
        if case.optimizer == "sgd"
        else MuonByHand()
        if "muon" in case.optimizer
        else ByTorch(partial(torch.optim.AdamW, **adam))
    )
    wanted = reference_run(
        weighting, STEPS, counts, world, dtype, lr=lr, head_lr=head_lr, joint=bool(case.joint_at), at=case.at,
        optimizer=by_hand,
    )  # fmt: skip
    weights = {name: whole_master(engine, p) for name, p in engine.module.named_parameters() if p.requires_grad}
    found = compare(weights, reports, wanted, toy.make_model())
    balancer.detach()
    engine.destroy()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed never resets it for the engine of the next case
    return found


def _optimizer(
    name: str, model: toy.ToyModel, groups: list[dict], lr: float, adam: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer of a case; `lr` is of SGD, `adam` are the settings of an AdamW."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if name.startswith("muon"):
        return muon(model, "standard" if "standard" in name else "gram")
    if name == "adamw":
        return torch.optim.AdamW(groups, **adam)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if name == "fused adam":
        return FusedAdam(groups, **adam)
    return DeepSpeedCPUAdam(groups, **adam, fp32_optimizer_states="bf16" not in name)


def _largest_ratio(found: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, float]]) -> float:
    return max(
        abs(float(row[task]) / value - 1)
        for row, want in zip(found, wanted, strict=True)
        for task, value in want.items()
    )
