"""When do tasks on different ranks take less time per step than all tasks on every rank, one after another?

    python -m benchmarks.speed.task_parallel --json benchmarks/results/task_parallel.json       # 6 minutes on 2 cores
    sudo python -m benchmarks.speed.task_parallel --rate 400mbit    # two hosts of two ranks joined by this link

A ViT reads images of three sizes, so that detection costs about 4 times and segmentation 2 times as much as
classification. In the sequential modes each of 4 CPU ranks runs one micro-batch of every task. In the task-parallel
modes ("apart") the same micro-batches are divided among the ranks of their task; `plan_groups` chooses the groups from
times measured at the start. All modes live in one process per rank and alternate. Three kinds of cost:

    computed        the ViT's own forward and backward passes; ranks that share cores hide the cost of waiting
    slept           simulated: a tiny model, and every micro-batch sleeps for its task's cost; ranks share no cores
    slept, uneven   as slept, where a micro-batch costs 0.5 to 1.5 times as much, as with images of many sizes

"idle" is the part of all ranks' time in which no micro-batch runs. "difference" is the largest absolute difference of a
weight from "one after another, exact".
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.machine import link_bytes
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate
from benchmarks.common.vit import build_engine, build_model, random_batch

SIZES = {"det": 128, "seg": 96, "cls": 64}  # pixels: 64, 36 and 16 patches of 16 x 16
SECONDS = {"det": 0.8, "seg": 0.4, "cls": 0.2}  # slept by one micro-batch
BATCH = 4
COSTS = ("computed", "slept", "slept, uneven")
MODES = {
    "one after another, exact": {"norm": "exact"},
    "one after another, sketch": {"norm": "sketch"},
    "one after another, delayed": {"norm": "delayed"},
    "apart, exact": {"norm": "exact", "parallel": "tasks"},
    "apart, sketch": {"norm": "sketch", "parallel": "tasks"},
}
BASE = "one after another, exact"


def measure(stage: int, cost: str, args: argparse.Namespace) -> dict:
    """Alternate all modes; return their figures. Call on every rank."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer, plan_groups

    width, layers = (args.width, args.layers) if cost == "computed" else (64, 2)
    busy = [0.0]  # seconds that this rank computed or slept in a step

    def loss_of(balancer, task: str, step: int, rank: int):
        seed = (step * 31 + list(SIZES).index(task)) * 37 + rank
        x, y = random_batch(BATCH, SIZES[task], seed)
        if cost != "computed":
            generator = torch.Generator().manual_seed(seed)
            time.sleep(SECONDS[task] * (0.5 + float(torch.rand((), generator=generator)) if "uneven" in cost else 1.0))
            x = x[..., :32, :32]
        return balancer.engine(task, x, y)

    def make_balancer(options):
        model = build_model(width, layers, max(SIZES.values()), SIZES, head_width=32)
        return TaskBalancer(build_engine(model, stage, 1, BATCH), SIZES, "backbone", TBGC(0.1), **options)

    balancers = {name: make_balancer(options) for name, options in MODES.items()}
    apart = balancers["apart, exact"]
    costs = apart.measure(lambda task: loss_of(apart, task, 0, dist.get_rank()))
    plan = plan_groups(costs, dist.get_world_size())
    for balancer in balancers.values():
        if balancer.parallel == "tasks":
            balancer.regroup(plan.groups)

    def time_step(balancer, step: int) -> list[float]:
        dist.barrier()
        sent, start = link_bytes(), time.perf_counter()
        busy[0] = 0.0
        for task in balancer.tasks:
            mine = balancer.share(task)
            with balancer.task(task, len(mine)):
                for _, rank in mine:
                    begin = time.perf_counter()
                    balancer.backward(loss_of(balancer, task, step, rank))
                    busy[0] += time.perf_counter() - begin
        balancer.step()
        return [time.perf_counter() - start, busy[0], link_bytes() - sent]

    rows: dict[str, list[list[float]]] = {name: [] for name in balancers}
    for step in range(2 + args.rounds):
        for name in rotate(balancers, step):
            row = time_step(balancers[name], step)
            if step >= 2:  # delayed norms begin with an exact step
                rows[name].append(row)
    of_rank = torch.tensor([rows[name] for name in balancers], dtype=torch.float64)  # (modes, rounds, 3)
    gathered = [torch.empty_like(of_rank) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, of_rank)
    table = torch.stack(gathered)  # (ranks, modes, rounds, 3)
    slowest = dict(zip(balancers, table[..., 0].amax(0), strict=True))  # mode -> (rounds,)
    weights = [p.detach().double() for p in balancers[BASE].engine.module.parameters()]
    results = {}
    for number, (name, balancer) in enumerate(balancers.items()):
        seconds = slowest[name].tolist()
        ratio, quartiles = median_ratio(seconds, slowest[BASE].tolist())
        others = [p.detach().double() for p in balancer.engine.module.parameters()]
        results[name] = {
            "seconds": statistics.median(seconds), "every_step": seconds, "ratio": ratio, "quartiles": quartiles,
            "idle": float(1 - table[:, number, :, 1].mean(0).div(slowest[name]).mean()),
            "sent": int(table[0, number, -1, 2]), "extra_bytes": balancer.extra_bytes,
            "off": max(float((a - b).abs().max()) for a, b in zip(weights, others, strict=True)),
        }  # fmt: skip
    for balancer in balancers.values():
        balancer.engine.destroy()
    return {
        "stage": stage, "cost": cost, "ranks": dist.get_world_size(), "rate": args.rate, "rounds": args.rounds,
        "micro_batch_seconds": costs, "plan": str(plan), "modes": results,
    }  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True, rate=True)
    parser.add_argument("--stages", type=int, nargs="*", default=[2], choices=(1, 2), help="ZeRO stages (default: 2)")
    parser.add_argument("--costs", nargs="*", default=list(COSTS), choices=COSTS, help="default: all")
    parser.add_argument("--ranks", type=int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every mode (default: 7)")
    parser.add_argument("--width", type=int, default=256, help="channels of the ViT (default: 256)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the ViT (default: 6)")
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, lambda: [measure(stage, cost, args) for stage in args.stages for cost in args.costs])
        return
    device = {"DS_ACCELERATOR": "cpu"}
    rows = measure_on_ranks(__spec__.name, sys.argv[1:], args.ranks, rate=args.rate, environment=device)
    print_head("ZeRO", "cost", "mode", "step s", "ratio", "quartiles", "idle", "MB sent", "difference")
    for row in rows:
        for mode, found in row["modes"].items():
            print_row(row["stage"], row["cost"], mode, f"{found['seconds']:.2f}", f"{found['ratio']:.3f}",
                      quartiles_cell(found["quartiles"]), f"{found['idle']:.0%}", f"{found['sent'] / 1e6:.0f}",
                      f"{found['off']:.0e}")  # fmt: skip
        print(f"\n{row['plan']}\n")
    write_record(args.json, rows=rows)


if __name__ == "__main__":
    main()
