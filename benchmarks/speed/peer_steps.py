"""The ways of balancing that `peers.py` compares, each as a function that takes one optimizer step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.common.vit import balanced_step, build_engine, build_model, plain_step, random_batch

ENGINES = ("plain", "exact", "sketch", "delayed", "safe_get_full_grad")
LOCAL = ("dense T x P matrix", "torchjd autojac", "torchjd autogram")


def ways_for(ranks: int) -> tuple[str, ...]:
    """Return the ways that run on R ranks; those without DeepSpeed run on one rank only."""
    return ENGINES + LOCAL if ranks == 1 else ENGINES


def make_step(way: str, tasks: tuple[str, ...], args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that takes one optimizer step. Call on every rank."""
    import torch.distributed as dist

    x, y = random_batch(args.batch, args.size, dist.get_rank())
    model = build_model(args.width, args.layers, args.size, tasks)
    if way in LOCAL:
        return _make_local_step(way, tasks, model, x, y)
    engine = build_engine(model, 2, len(tasks) if way == "plain" else 1, args.batch)
    if way == "plain":
        return lambda: plain_step(engine, tasks, x, y)
    if way == "safe_get_full_grad":
        return lambda: _accessor_step(engine, tasks, x, y)
    from allinone_ds import TBGC, TaskBalancer

    balancer = TaskBalancer(engine, tasks, "backbone", TBGC(0.1), norm=way)
    return lambda: balanced_step(balancer, x, y)


def _accessor_step(engine: Any, tasks: tuple[str, ...], x: Any, y: Any) -> None:
    """Take a TBGC step with `safe_get_full_grad` and `safe_set_full_grad`: T full gradients on every rank.

    If every backward is at the accumulation boundary, ZeRO-2 keeps only the last task's gradient. Each gradient is
    therefore read directly after its backward.
    """
    import torch
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    named = [(n.startswith("backbone."), p) for n, p in engine.module.named_parameters() if p.requires_grad]
    total: list = [None] * len(named)
    for task in tasks:
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(task, x, y))
        gradients = [safe_get_full_grad(p) for _, p in named]
        shared = [g for g, (backbone, _) in zip(gradients, named, strict=True) if backbone and g is not None]
        factor = (0.1 / (torch.nn.utils.get_total_norm(shared) + 1e-6)).clamp(max=1.0)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                total[index] = gradient * factor if total[index] is None else total[index].add_(gradient * factor)
    for (_, parameter), gradient in zip(named, total, strict=True):
        if gradient is not None:
            safe_set_full_grad(parameter, gradient)
    engine.step()


def _make_local_step(way: str, tasks: tuple[str, ...], model: Any, x: Any, y: Any) -> Callable[[], None]:
    """Return the step of a way that runs in one process without DeepSpeed."""
    import torch
    from torchjd.aggregation import IMTLG, IMTLGWeighting

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shared = [p for p in model.backbone.parameters() if p.requires_grad]

    def losses():
        return torch.stack([model(task, x, y) for task in tasks])  # (T,)

    def dense() -> None:  # the matrix of all tasks' gradients, as LibMTL and the papers' own code store it
        rows = torch.zeros(len(tasks), sum(p.numel() for p in shared))  # (T, P)
        for row, task in zip(rows, tasks, strict=True):
            loss = model(task, x, y)
            loss.backward()
            row.copy_(torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in shared]))
            for p in shared:
                p.grad = None
        summed = IMTLGWeighting()(rows @ rows.T) @ rows
        for p, part in zip(shared, summed.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p)

    def autojac() -> None:
        from torchjd.autojac import backward, jac_to_grad

        backward(losses(), inputs=list(model.parameters()))
        jac_to_grad(list(model.parameters()), IMTLG())

    def autogram() -> None:
        values = losses()
        values.backward(IMTLGWeighting()(gram.compute_gramian(values)))

    if way == "torchjd autogram":
        from torchjd.autogram import Engine

        gram = Engine(model.backbone, batch_dim=None)
    compute = {"dense T x P matrix": dense, "torchjd autojac": autojac, "torchjd autogram": autogram}[way]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute()
        optimizer.step()

    return step
