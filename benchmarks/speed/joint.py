"""What do T tasks on one image set cost, with one forward or T of them, beside other libraries?

    python -m benchmarks.speed joint            # 3, 8 and 40 tasks on 1 and 2 ranks, into docs/performance.md
    python -m benchmarks.speed.joint --tasks 3 --ranks 1 --ways "plain sum" separate backbone

The first command takes about 15 minutes on 2 idle cores.

A ViT, one linear head per task on all tokens, AdamW. "plain sum" is one forward and one backward of the sum of all
losses on ZeRO-2, "torch sum" the same without DeepSpeed (DDP on 2 ranks). "separate", "backbone" and "features" are
this package: one block per task, `joint(at="backbone")` and `joint(at="features")`; "norm=features" is the latter on a
balancer that keeps no gradient. FeatureBalance, torchjd and the loops of LibMTL run without DeepSpeed, the last two
in one process only. All equalize the norms of the tasks' gradients: TBGC in this package, IMTL-G in torchjd, and plain
norms in the loops of LibMTL, which are written here after its source.

- Seconds: all ways of a row live in one process per rank and alternate; the figure is the median over rounds of a way's
  seconds / those of its plain sum. Ways with T backwards through the backbone run in fewer rounds.
- Processor: the same with the processor seconds of rank 0, which other load on the machine does not change.
- "of separate": seconds and processor seconds of a way / those of separate forwards.
- Memory: each way in processes of its own; the peak, over two steps, of the bytes of all tensors of a rank without
  weights and optimizer state: activations, gradients and what a method keeps beside them. Bytes are those of PyTorch's
  allocator, so the figure is the same in every run; the largest of all ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common.forked_function import call_on_ranks
from benchmarks.common.memory import peak_tensor_bytes
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate
from benchmarks.speed.peers import import_everything, task_names


def slow_rounds_of(args: argparse.Namespace, count: int) -> int:
    """Return the rounds of ways with T backwards through the backbone: fewer with many tasks, which take long."""
    return max(min(args.rounds, args.slow_backwards // count), 1)


def seconds(args: argparse.Namespace, count: int, wanted: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Return the seconds and processor seconds of every round, by way. Called on every rank."""
    import torch.distributed as dist

    from benchmarks.speed.joint_steps import SLOW, make_way

    steps = {way: make_way(way, task_names(count), args).step for way in wanted}
    slow_rounds = slow_rounds_of(args, count)
    found: dict[str, dict[str, list[float]]] = {way: {"wall": [], "processor": []} for way in steps}
    for number in range(-1, args.rounds):  # the first round warms up
        for way in rotate([w for w in steps if number < slow_rounds or w not in SLOW], number):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            steps[way]()
            dist.barrier()
            if number >= 0:
                found[way]["wall"].append(time.perf_counter() - wall)
                found[way]["processor"].append(time.process_time() - processor)
    return found


def peak_memory(args: argparse.Namespace, count: int, way: str) -> int:
    """Return the peak of a rank's tensor bytes in two steps, without weights and optimizer state."""
    import torch
    import torch.distributed as dist

    from benchmarks.speed.joint_steps import make_way

    held = 0

    def run() -> None:
        nonlocal held
        made = make_way(way, task_names(count), args)
        for _ in range(2):  # the optimizer has its state after the first
            made.step()
        held = made.held()

    largest = torch.tensor(peak_tensor_bytes(run) - held)
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
                if "separate" in found and base_of(way) == base_of("separate"):
                    slow = found["separate"]
                    both = min(rounds, len(slow["wall"]))
                    for key, kind in (("of_separate", "wall"), ("processor_of_separate", "processor")):
                        result[key], _ = median_ratio(row[kind][:both], slow[kind][:both])
                if args.memory:
                    result["peak"] = call_on_ranks([None] * ranks, None, peak_memory, args, count, way)
                yield result


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="*", default=[3, 8, 40], help="numbers of tasks")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--ways", nargs="*", default=[], help="only these ways, plain sums among them")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of one step per way (default: 9)")
    parser.add_argument(
        "--slow-backwards", type=int, default=24, help="T x rounds of ways with T backwards (default: 24)"
    )
    parser.add_argument("--batch", type=int, default=4, help="images per rank (default: 4)")
    parser.add_argument("--width", type=int, default=384, help="channels of the ViT (default: 384)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the ViT (default: 6)")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default: 128)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure seconds only")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"DS_LOG_LEVEL": "error", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    os.environ["KINETO_LOG_LEVEL"] = "99"

    import_everything()
    start, rows = time.perf_counter(), []
    shape = {name: getattr(args, name) for name in ("rounds", "slow_backwards", "batch", "width", "layers", "size")}
    print_head(
        "tasks", "ranks", "way", "s per step", "of its plain sum", "quartiles", "processor", "of separate", "MiB"
    )
    for row in measure_rows(args):
        rows.append(row)
        separate = f"{row['of_separate']:.3f} ({row['processor_of_separate']:.3f})" if "of_separate" in row else ""
        peak = f"{row['peak'] / 2**20:.1f}" if "peak" in row else ""
        print_row(row["tasks"], row["ranks"], row["way"], f"{row['seconds']:.3f}", f"{row['ratio']:.3f}",
                  quartiles_cell(row["quartiles"], 3), f"{row['processor']:.3f}", separate, peak)  # fmt: skip
        write_record(args.json, took=time.perf_counter() - start, shape=shape, rows=rows)  # also of a run that is ended


if __name__ == "__main__":
    main()
