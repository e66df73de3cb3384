"""What do T tasks on one image set cost, with one forward or T of them, beside other libraries?

    python -m benchmarks.speed.joint --tasks 3 --json benchmarks/results/joint_3.json
    python -m benchmarks.speed.joint --tasks 8 --json benchmarks/results/joint_8.json
    python -m benchmarks.speed.joint --tasks 40 --slow-rounds 2 --json benchmarks/results/joint_40.json

A ViT, one linear head per task on all tokens, AdamW. "plain sum" is one forward and one backward of the sum of all
losses on ZeRO-2, "torch sum" the same without DeepSpeed (DDP on 2 ranks). "separate", "backbone" and "features" are
this package: one block per task, `joint(at="backbone")` and `joint(at="features")`; "norm=features" is the latter on a
balancer that keeps no gradient. FeatureBalance, torchjd and the loops of LibMTL run without DeepSpeed, the last two
in one process only. All equalize the norms of the tasks' gradients: TBGC in this package, IMTL-G in torchjd, and plain
norms in the loops of LibMTL, which are written here after its source.

- Seconds: all ways of a row live in one process per rank and alternate; the figure is the median over rounds of a way's
  seconds / those of its plain sum. Ways with T backwards through the backbone run in the first rounds only.
- Processor: the same with the processor seconds of rank 0, which other load on the machine does not change.
- Memory: each way in processes of its own; the peak of a rank's resident memory (VmHWM) in two steps above the
  resident memory before the model was built, the largest of all ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common.forked_function import call_on_ranks
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate
from benchmarks.speed.peers import import_everything, resident, task_names


def seconds(args: argparse.Namespace, count: int, wanted: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds and processor seconds of every round, by way. Called on every rank."""
    import torch.distributed as dist

    from benchmarks.speed.joint_steps import SLOW, make_step

    steps = {way: make_step(way, task_names(count), args) for way in wanted}
    found: dict[str, dict[str, list[float]]] = {way: {"wall": [], "processor": []} for way in steps}
    for number in range(-1, args.rounds):  # the first round warms up
        for way in rotate([w for w in steps if number < args.slow_rounds or w not in SLOW], number):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            steps[way]()
            dist.barrier()
            if number >= 0:
                found[way]["wall"].append(time.perf_counter() - wall)
                found[way]["processor"].append(time.process_time() - processor)
    return found


def peak_memory(args: argparse.Namespace, count: int, way: str) -> int:
    """Return the peak of a rank's resident bytes in two steps, above that before the model was built."""
    import torch
    import torch.distributed as dist

    from benchmarks.common.vit import build_model
    from benchmarks.speed.joint_steps import make_step

    tiny = build_model(64, 1, 32)  # imports what a model needs, so that it counts as present before
    tiny("det", torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)).backward()
    before = resident("VmRSS")
    step = make_step(way, task_names(count), args)
    for _ in range(2):  # the optimizer has its state after the first
        step()
    largest = torch.tensor(resident("VmHWM") - before)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def measure_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per number of ranks, number of tasks, and way."""
    from benchmarks.speed.joint_steps import base_of, ways_for

    for ranks in args.ranks:
        wanted = tuple(way for way in ways_for(ranks) if not args.ways or way in args.ways)
        for count in args.tasks:
            found = call_on_ranks([None] * ranks, None, seconds, args, count, wanted)
            for way, row in found.items():
                rounds, base = len(row["wall"]), found[base_of(way)]
                ratio, quartiles = median_ratio(row["wall"], base["wall"][:rounds])
                processor, _ = median_ratio(row["processor"], base["processor"][:rounds])
                result = {"tasks": count, "ranks": ranks, "way": way, "base": base_of(way), "rounds": rounds,
                          "seconds": statistics.median(row["wall"]), "ratio": ratio, "quartiles": quartiles,
                          "processor": processor}  # fmt: skip
                if "separate" in found and way == "backbone":
                    result["of_separate"], _ = median_ratio(row["wall"], found["separate"]["wall"])
                    result["processor_of_separate"], _ = median_ratio(row["processor"], found["separate"]["processor"])
                if args.memory:
                    result["peak"] = call_on_ranks([None] * ranks, None, peak_memory, args, count, way)
                yield result


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="*", default=[3, 8, 40], help="numbers of tasks")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--ways", nargs="*", default=[], help="only these ways, plain sums among them")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of one step per way (default: 15)")
    parser.add_argument("--slow-rounds", type=int, default=5, help="rounds of ways with T backwards (default: 5)")
    parser.add_argument("--batch", type=int, default=4, help="images per rank (default: 4)")
    parser.add_argument("--width", type=int, default=384, help="channels of the ViT (default: 384)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the ViT (default: 6)")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default: 128)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure seconds only")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"DS_LOG_LEVEL": "error", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}

    import_everything()
    start, rows = time.perf_counter(), []
    shape = {name: getattr(args, name) for name in ("rounds", "slow_rounds", "batch", "width", "layers", "size")}
    print_head("tasks", "ranks", "way", "s per step", "of its plain sum", "quartiles", "processor", "peak MiB per rank")
    for row in measure_rows(args):
        rows.append(row)
        peak = f"{row['peak'] / 2**20:.0f}" if "peak" in row else ""
        print_row(row["tasks"], row["ranks"], row["way"], f"{row['seconds']:.3f}", f"{row['ratio']:.3f}",
                  quartiles_cell(row["quartiles"], 3), f"{row['processor']:.3f}", peak)  # fmt: skip
        write_record(args.json, took=time.perf_counter() - start, shape=shape, rows=rows)  # also of a run that is ended
    for row in rows:
        if "of_separate" in row:
            print(f"{row['tasks']} tasks, {row['ranks']} rank(s): backbone takes {row['of_separate']:.3f} of separate "
                  f"forwards, processor {row['processor_of_separate']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
