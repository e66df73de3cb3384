"""Balanced multi-task steps side by side: this package, DeepSpeed accessors, torchjd, a dense T x P matrix.

    python benchmarks/peers.py                                   # T = 2, 3, 5, 8 tasks on 1 and 2 ranks
    python benchmarks/peers.py --tasks 3 --ranks 2 --json benchmarks/results/peers.json

Every way makes the same kind of step (a ViT, a linear head a task, T batches, AdamW) and equalises the tasks' backbone
gradients: TBGC here, IMTL-G in torchjd. Times: all ways of a row live in one process and take turns; the ratio of
medians is to plain DeepSpeed accumulation, which balances nothing. Memory: a process of its own for each way, the peak
of a rank's resident memory above what it held before the model was made. torchjd and the dense matrix know no ZeRO, so
they run on one rank only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from overhead import TASKS, build_engine, build_model

ENGINES = ("plain DeepSpeed", "exact", "sketch", "delayed", "safe_get_full_grad")
LOCAL = ("dense T x P matrix", "torchjd autojac", "torchjd autogram")


def ways_for(ranks: int) -> tuple[str, ...]:
    """What can run on so many ranks."""
    return ENGINES + LOCAL if ranks == 1 else ENGINES


def make_step(way: str, tasks: tuple[str, ...], args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one optimizer step in a way of balancing."""
    import torch
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    y = torch.randint(100, (args.batch,), generator=generator)
    shape = (args.width, args.layers, args.size)
    if way in LOCAL:
        return _local_step(way, tasks, build_model(*shape, tasks), x, y)
    engine, _ = build_engine(2, len(tasks) if way == "plain DeepSpeed" else 1, *shape, args.batch, tasks)

    if way == "plain DeepSpeed":

        def step() -> None:
            for task in tasks:
                engine.backward(engine(task, x, y))
                engine.step()

    elif way == "safe_get_full_grad":

        def step() -> None:
            _accessor_step(engine, tasks, x, y)

    else:
        from allinone_ds import TBGC, TaskBalancer

        balancer = TaskBalancer(engine, tasks, "backbone", TBGC(0.1), norm=way)

        def step() -> None:
            for task in tasks:
                with balancer.task(task):
                    balancer.backward(engine(task, x, y))
            balancer.step()

    return step


def _accessor_step(engine, tasks, x, y) -> None:
    """TBGC with `safe_get_full_grad` and `safe_set_full_grad`: whole gradients on every rank, T times.

    With every backward at the boundary ZeRO-2 keeps the last task's gradient only, so each is read as it comes.
    """
    import torch
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    named = [(n.startswith("backbone."), p) for n, p in engine.module.named_parameters() if p.requires_grad]
    total: list = [None] * len(named)
    for task in tasks:
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(task, x, y))
        found = [safe_get_full_grad(p) for _, p in named]
        shared = [g for g, (backbone, _) in zip(found, named, strict=True) if backbone and g is not None]
        factor = (0.1 / (torch.nn.utils.get_total_norm(shared) + 1e-6)).clamp(max=1.0)
        for index, gradient in enumerate(found):
            if gradient is not None:
                total[index] = gradient * factor if total[index] is None else total[index].add_(gradient * factor)
    for (_, parameter), gradient in zip(named, total, strict=True):
        if gradient is not None:
            safe_set_full_grad(parameter, gradient)
    engine.step()


def _local_step(way: str, tasks, model, x, y) -> Callable[[], None]:
    """One process without DeepSpeed."""
    import torch
    from torchjd.aggregation import IMTLG, IMTLGWeighting

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shared = [p for p in model.backbone.parameters() if p.requires_grad]

    def losses():
        return torch.stack([model(task, x, y) for task in tasks])

    def dense() -> None:  # the matrix of all tasks' gradients, as LibMTL and the papers' own codes keep it
        rows = torch.zeros(len(tasks), sum(p.numel() for p in shared))
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
        found = losses()
        found.backward(IMTLGWeighting()(gram.compute_gramian(found)))

    if way == "torchjd autogram":
        from torchjd.autogram import Engine

        gram = Engine(model.backbone, batch_dim=None)
    compute = {"dense T x P matrix": dense, "torchjd autojac": autojac, "torchjd autogram": autogram}[way]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute()
        optimizer.step()

    return step


def times(count: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step of every way; collective."""
    import torch.distributed as dist

    tasks = tuple(f"task{i}" for i in range(count))
    steps = {way: make_step(way, tasks, args) for way in ways_for(dist.get_world_size())}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for round_ in range(args.rounds + 1):
        for way in [*list(steps)[round_ % len(steps) :], *list(steps)[: round_ % len(steps)]]:
            dist.barrier()
            start = time.perf_counter()
            steps[way]()
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(values[1:]) for way, values in seconds.items()}


def memory(way: str, count: int, args: argparse.Namespace) -> float:
    """Peak resident MiB of this rank in three steps, above what it held before the model was made."""
    import torch

    tiny = build_model(64, 1, 32)  # for what it imports
    tiny(TASKS[0], torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)).backward()
    before = _resident("VmRSS")
    step = make_step(way, tuple(f"task{i}" for i in range(count)), args)
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def launch(ranks: int, *words: str) -> dict:
    """Run this file on so many ranks; what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        subprocess.run([*command, "--out", str(out), *words], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        return json.loads(out.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 3, 5, 8])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed()
        count = args.tasks[0]
        found = {args.way: memory(args.way, count, args)} if args.way else times(count, args)
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps(found))
        dist.barrier()
        return
    same = [f"--{name}={getattr(args, name)}" for name in ("rounds", "batch", "width", "layers", "size")]
    rows = []
    print(
        "| tasks | ranks | way | s a step | ratio to plain | peak MiB a rank |\n|---|---|---|---|---|---|", flush=True
    )
    for count in args.tasks:
        for ranks in args.ranks:
            words = [*same, "--tasks", str(count)]
            seconds = launch(ranks, *words)
            for way in ways_for(ranks):
                peak = launch(ranks, *words, "--way", way)[way]
                ratio = seconds[way] / seconds[ENGINES[0]]
                rows.append({"tasks": count, "ranks": ranks, "way": way, "seconds": seconds[way], "ratio": ratio,
                             "peak_mib": peak})  # fmt: skip
                print(f"| {count} | {ranks} | {way} | {seconds[way]:.2f} | {ratio:.2f} | {peak:.0f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
