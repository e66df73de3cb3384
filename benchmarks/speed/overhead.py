"""How much longer does a balanced step take than plain DeepSpeed accumulation of the same micro-steps?

    python -m benchmarks.speed.overhead                     # ViT of 22M, 3 tasks, batch 8, 2 CPU ranks, ZeRO 1, 2, 3
    python -m benchmarks.speed.overhead --stages 2 --modes exact --json benchmarks/results/overhead.json
    sudo python -m benchmarks.speed.overhead --rate 400mbit --size 96 --batch 2     # two hosts joined by a slow link

The first command takes about 20 minutes on 2 idle cores (10 with `--modes exact`), the last one 10 minutes.

All engines live in one process per rank and alternate, one step each, so that other load on the machine affects all of
them. The figure is the median over rounds of the mode's time / the plain time, with the quartiles. With --rate the
ranks run in two network namespaces joined by a link of that rate (needs root), and the bytes sent over the link are
counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from allinone_ds.training.launcher import gpu_count
from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.machine import link_bytes
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate
from benchmarks.common.vit import (
    TASKS,
    balanced_step,
    build_engine,
    build_model,
    count_parameters,
    plain_step,
    random_batch,
)

MODES = {
    "exact": {"norm": "exact"},
    "exact, one trace": {"norm": "exact", "task_traces": False},
    "sketch": {"norm": "sketch"},
    "delayed": {"norm": "delayed"},
}


def modes_for(stage: int, wanted: list[str]) -> list[str]:
    """Return the modes that differ on a ZeRO stage: traces exist under ZeRO-3 only."""
    return [mode for mode in wanted if stage == 3 or "trace" not in mode]


def measure(stage: int, args: argparse.Namespace) -> list[dict]:
    """Alternate plain and balanced steps; return one row per mode. Call on every rank."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer

    shape = (args.width, args.layers, args.size)
    plain = build_engine(build_model(*shape), stage, len(TASKS), args.batch)
    x, y = (part.to(plain.device) for part in random_batch(args.batch, args.size, dist.get_rank()))
    balancers = {
        mode: TaskBalancer(
            build_engine(build_model(*shape), stage, 1, args.batch), TASKS, "backbone", TBGC(0.1), **MODES[mode]
        )
        for mode in modes_for(stage, args.modes)
    }
    steps: dict[str, Callable[[], None]] = {"plain": lambda: plain_step(plain, TASKS, x, y)}
    steps |= {mode: lambda b=balancer: balanced_step(b, x, y) for mode, balancer in balancers.items()}

    def synchronize() -> None:
        if plain.device.type == "cuda":
            torch.cuda.synchronize()

    def time_step(name: str) -> tuple[float, int]:
        synchronize()
        dist.barrier()
        sent, start = link_bytes(), time.perf_counter()
        steps[name]()
        synchronize()
        return time.perf_counter() - start, link_bytes() - sent

    for _ in range(2):  # traces are complete after two passes, and delayed norms begin with an exact step
        for name in steps:
            time_step(name)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, int] = {}
    for number in range(args.pairs):
        for name in rotate(steps, number):
            duration, sent[name] = time_step(name)
            seconds[name].append(duration)
    rows = []
    for mode, balancer in balancers.items():
        ratio, quartiles = median_ratio(seconds[mode], seconds["plain"])
        rows.append({
            "stage": stage, "mode": mode, "ranks": dist.get_world_size(), "parameters": count_parameters(plain.module),
            "batch": args.batch, "size": args.size, "rate": args.rate, "rounds": args.pairs,
            "plain_s": statistics.median(seconds["plain"]), "balanced_s": statistics.median(seconds[mode]),
            "ratio": ratio, "ratio_quartiles": quartiles, "extra_bytes": balancer.extra_bytes,
            "plain_sent": sent["plain"], "sent": sent[mode],
        })  # fmt: skip
    for engine in (plain, *(balancer.engine for balancer in balancers.values())):
        engine.destroy()
    return rows


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True, rate=True)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3], help="ZeRO stages (default: 1 2 3)")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES), help="default: all")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--pairs", type=int, default=9, help="timed rounds of one step per mode (default: 9)")
    parser.add_argument("--batch", type=int, default=8, help="images per rank and micro-step (default: 8)")
    parser.add_argument("--width", type=int, default=384, help="channels of the ViT (default: 384)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the ViT (default: 12)")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (default: 224)")
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, lambda: [row for stage in args.stages for row in measure(stage, args)])
        return
    device = {"DS_ACCELERATOR": "cuda"} if gpu_count() else {}
    rows = measure_on_ranks(__spec__.name, sys.argv[1:], args.ranks, rate=args.rate, environment=device)
    print_head("ZeRO", "mode", "plain s", "balanced s", "ratio", "quartiles", "extra MiB per rank", "MB sent, plain",
               "MB sent")  # fmt: skip
    for row in rows:
        print_row(row["stage"], row["mode"], f"{row['plain_s']:.2f}", f"{row['balanced_s']:.2f}",
                  f"{row['ratio']:.3f}", quartiles_cell(row["ratio_quartiles"]), f"{row['extra_bytes'] / 2**20:.1f}",
                  f"{row['plain_sent'] / 1e6:.0f}", f"{row['sent'] / 1e6:.0f}")  # fmt: skip
    write_record(args.json, rows=rows)


if __name__ == "__main__":
    main()
