"""How do time, memory and traffic of this package's steps compare with other ways to balance tasks' gradients?

    sudo python -m benchmarks.speed.peers --json benchmarks/results/peers.json --plot docs/images/peers.png
    sudo python -m benchmarks.speed.peers --rate 400mbit --tasks 3 --ranks 2

The first command takes 24 minutes on 2 cores, the second 3 minutes.

Compared are this package, DeepSpeed's gradient accessors, a dense T x P matrix, and torchjd. Each takes the same kind
of step (a ViT, one linear head per task, T batches, AdamW, ZeRO-2 where there is an engine) and equalizes the tasks'
backbone gradients: TBGC in this package and with the accessors, IMTL-G in the others. "plain" is DeepSpeed's
accumulation of the same micro-steps, which balances nothing. torchjd and the dense matrix do not support ZeRO and run
on one rank only. LibMTL stores the dense matrix; its package (1.1.5) imports a module that torchvision has removed.

- Seconds: all ways of a row live in one process per rank and alternate; the figure is the median over rounds of a way's
  seconds / the plain seconds.
- Memory: each way in processes of its own; the peak of a rank's resident memory above that before the model was built,
  the largest of all ranks.
- Bytes: what the ranks' network namespace sent per step, divided by the number of ranks; left out without root.
- Capacity: memory at two depths; on the line through them, the model size at which a rank reaches 4 GiB.

With --rate two ranks run in two namespaces joined by a link of that rate, and only seconds and bytes are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.forked_function import call_on_ranks
from benchmarks.common.launch import one_host, two_hosts
from benchmarks.common.machine import sent_bytes
from benchmarks.common.report import make_parser, print_head, print_row, quartiles_cell, write_record
from benchmarks.common.rounds import median_ratio, rotate
from benchmarks.common.vit import build_model, count_parameters
from benchmarks.speed.peer_steps import ENGINES, LOCAL, make_step, ways_for

LIMIT = 4 * 2**30
"""Bytes per rank that capacity is measured for."""


def task_names(count: int) -> tuple[str, ...]:
    """Return the names of T tasks."""
    return tuple(f"task{i}" for i in range(count))


# ---- measurements, called on every rank ----


def seconds_and_bytes(args: argparse.Namespace, count: int) -> dict[str, dict[str, Any]]:
    """Return the seconds of every round and the bytes sent per step and rank, by way."""
    import torch
    import torch.distributed as dist

    steps = {way: make_step(way, task_names(count), args) for way in ways_for(dist.get_world_size())}
    found: dict[str, dict[str, Any]] = {way: {"seconds": [], "sent": 0} for way in steps}
    for number in range(args.rounds + 2):  # the first two rounds warm up
        for way in rotate(steps, number):
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            steps[way]()
            dist.barrier()
            if number >= 2:
                found[way]["seconds"].append(time.perf_counter() - start)
                found[way]["sent"] = torch.tensor(sent_bytes() - before)
    for row in found.values():
        if args.rate:  # each host counts what it sent itself
            dist.all_reduce(row["sent"])
        row["sent"] = int(row["sent"]) / dist.get_world_size()
    return found


def peak_memory(args: argparse.Namespace, count: int, way: str, layers: int) -> int:
    """Return the peak of a rank's resident bytes in three steps, above that before the model was built."""
    import torch
    import torch.distributed as dist

    tiny = build_model(64, 1, 32)  # imports what a model needs, so that it counts as present before
    tiny("det", torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)).backward()
    before = resident("VmRSS")
    shape = argparse.Namespace(**{**vars(args), "layers": layers})
    step = make_step(way, task_names(count), shape)
    for _ in range(3):
        step()
    largest = torch.tensor(resident("VmHWM") - before)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


# ---- launching ----


@contextlib.contextmanager
def namespaces_of(ranks: int, rate: str | None) -> Iterator[list[str | None]]:
    """Yield the network namespace of each rank: two joined by a link, one for all ranks, or (without root) None."""
    if rate:
        with two_hosts(rate) as names:
            yield [names[rank * 2 // ranks] for rank in range(ranks)]
    elif os.geteuid() == 0:
        with one_host() as name:
            yield [name] * ranks
    else:
        yield [None] * ranks


def import_everything() -> None:
    """Import what the ranks need before they are forked. PyTorch must compute nothing: its threads are not forked."""
    import deepspeed.comm.torch  # noqa: F401
    import torch.utils.cpp_extension
    import torchjd.aggregation
    import torchjd.autogram
    import torchjd.autojac  # noqa: F401
    from transformers import Dinov2Model  # noqa: F401

    import allinone_ds.balance  # noqa: F401
    from allinone_ds.zero.kernels import spare_cpu_kernel

    torch.set_num_threads(1)
    spare_cpu_kernel()


# ---- tables ----


def measure_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per number of ranks, number of tasks, and way."""
    for ranks in args.ranks:
        with namespaces_of(ranks, args.rate) as namespaces:
            for count in args.tasks:
                found = call_on_ranks(namespaces, args.rate, seconds_and_bytes, args, count)
                for way, row in found.items():
                    ratio, quartiles = median_ratio(row["seconds"], found["plain"]["seconds"])
                    result = {
                        "tasks": count, "ranks": ranks, "way": way, "rate": args.rate,
                        "seconds": statistics.median(row["seconds"]), "ratio": ratio, "quartiles": quartiles,
                        "sent": row["sent"] if namespaces[0] else None,
                    }  # fmt: skip
                    if not args.rate:
                        peak = call_on_ranks(namespaces, None, peak_memory, args, count, way, args.layers)
                        result["peak"] = peak
                    yield result


def measure_capacities(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the largest model, in parameters, that keeps a rank within `LIMIT`; only the depth changes."""
    depths = (args.layers, args.layers * 4)
    for ranks in args.capacity:
        with namespaces_of(ranks, None) as namespaces:
            for count in (args.tasks[0], args.tasks[-1]):
                sizes = [
                    count_parameters(build_model(args.width, layers, args.size, task_names(count))) for layers in depths
                ]
                for way in ways_for(ranks):
                    peaks = [call_on_ranks(namespaces, None, peak_memory, args, count, way, n) for n in depths]
                    per_byte = (sizes[1] - sizes[0]) / (peaks[1] - peaks[0])
                    largest = sizes[0] + per_byte * (LIMIT - peaks[0])
                    yield {"tasks": count, "ranks": ranks, "way": way, "parameters": round(largest), "sizes": sizes,
                           "peaks": peaks}  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time and memory over the number of tasks, one column per number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = sorted({row["ranks"] for row in rows})
    figure, axes = plt.subplots(2, len(ranks), figsize=(4.2 * len(ranks), 6.4), squeeze=False, sharex=True)
    for column, number in enumerate(ranks):
        for way in ways_for(number):
            of_way = [row for row in rows if row["ranks"] == number and row["way"] == way]
            style = {"marker": "o", "markersize": 3, "color": f"C{(ENGINES + LOCAL).index(way)}", "label": way}
            tasks = [row["tasks"] for row in of_way]
            axes[0, column].plot(tasks, [row["ratio"] for row in of_way], **style)
            axes[1, column].plot(tasks, [row["peak"] / 2**20 for row in of_way], **style)
        axes[0, column].set_title(f"{number} rank{'s' if number > 1 else ''}")
        axes[1, column].set_xlabel("tasks")
    axes[0, 0].set_ylabel("seconds per step / those of plain DeepSpeed")
    axes[1, 0].set_ylabel("peak MiB per rank")
    axes[0, 0].legend(fontsize=7)
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, rate=True)
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 3, 5, 8], help="numbers of tasks")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--capacity", type=int, nargs="*", default=[1, 2], help="numbers of ranks for the capacity")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of one step per way (default: 5)")
    parser.add_argument("--batch", type=int, default=4, help="images per rank and micro-step (default: 4)")
    parser.add_argument("--width", type=int, default=384, help="channels of the ViT (default: 384)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the ViT (default: 6)")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels (default: 64)")
    parser.add_argument("--plot", type=Path, help="draw the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"DS_LOG_LEVEL": "error", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}

    import_everything()
    start, rows, largest = time.perf_counter(), [], []
    print_head("tasks", "ranks", "way", "s per step", "of plain", "quartiles", "MB sent per rank", "peak MiB per rank")
    for row in measure_rows(args):
        rows.append(row)
        sent = "" if row["sent"] is None else f"{row['sent'] / 1e6:.1f}"
        peak = f"{row['peak'] / 2**20:.0f}" if "peak" in row else ""
        print_row(row["tasks"], row["ranks"], row["way"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}",
                  quartiles_cell(row["quartiles"], 2), sent, peak)  # fmt: skip
    if args.capacity and not args.rate:
        print()
        print_head("tasks", "ranks", "way", "largest model in 4 GiB per rank, M parameters")
        for row in measure_capacities(args):
            largest.append(row)
            print_row(row["tasks"], row["ranks"], row["way"], f"{row['parameters'] / 1e6:.0f}")
    shape = {name: getattr(args, name) for name in ("rounds", "batch", "width", "layers", "size", "rate")}
    write_record(args.json, took=time.perf_counter() - start, shape=shape, rows=rows, capacity=largest)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
