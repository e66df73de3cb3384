"""Balanced multi-task steps side by side: this package, DeepSpeed's accessors, a dense T x P matrix, torchjd.

    sudo python benchmarks/peers.py --json benchmarks/results/peers.json --plot docs/images/peers.png
    sudo python benchmarks/peers.py --rate 400mbit --tasks 3 --ranks 2 --json benchmarks/results/peers_400mbit.json

Every way makes the same kind of step (a ViT, a linear head a task, T batches, AdamW, ZeRO-2 where there is an engine)
and equalises the tasks' backbone gradients: TBGC here, IMTL-G in the others. "plain" is DeepSpeed's accumulation of
the same micro-steps, which balances nothing. torchjd and the dense matrix know no ZeRO, so they run on one rank only.
The matrix is what LibMTL keeps; its package (1.1.5) imports a module that torchvision no longer has.

- Seconds: all ways of a row live in one process a rank and take turns; median over rounds of a way's seconds / plain's.
- Memory: processes of their own for each way; the peak of a rank's resident memory above what it held before the model
  was made, the largest of all ranks.
- Bytes: what the ranks' network namespace sent in a step, for each rank; needs root, else it is left out.
- Capacity: memory at two depths, and along the line through them the depth at which a rank reaches 4 GiB.

With --rate two ranks run in two namespaces joined by a link of that rate, and only seconds and bytes are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import describe_machine, sent_bytes
from overhead import build_engine, build_model
from ranks import FIRST_HOST, two_hosts

ENGINES = ("plain", "exact", "sketch", "delayed", "safe_get_full_grad")
LOCAL = ("dense T x P matrix", "torchjd autojac", "torchjd autogram")
LIMIT = 4 * 2**30
"""Bytes of a rank that capacity is measured for."""


def ways_for(ranks: int) -> tuple[str, ...]:
    """What can run on so many ranks."""
    return ENGINES + LOCAL if ranks == 1 else ENGINES


# ---- the ways ----


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
    engine, _ = build_engine(2, len(tasks) if way == "plain" else 1, *shape, args.batch, tasks)

    if way == "plain":

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


# ---- measuring, on ranks ----


def seconds_and_bytes(args: argparse.Namespace, count: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round and bytes sent in a step of every way; collective."""
    import torch
    import torch.distributed as dist

    tasks = tuple(f"task{i}" for i in range(count))
    steps = {way: make_step(way, tasks, args) for way in ways_for(dist.get_world_size())}
    found: dict[str, dict[str, Any]] = {way: {"seconds": [], "sent": 0} for way in steps}
    for round_ in range(args.rounds + 2):  # the first two warm up
        for way in [*list(steps)[round_ % len(steps) :], *list(steps)[: round_ % len(steps)]]:
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            steps[way]()
            dist.barrier()
            if round_ >= 2:
                found[way]["seconds"].append(time.perf_counter() - start)
                found[way]["sent"] = torch.tensor(sent_bytes() - before)
    for row in found.values():
        if args.rate:  # each host counts its own link
            dist.all_reduce(row["sent"])
        row["sent"] = int(row["sent"]) / dist.get_world_size()
    return found


def peak(args: argparse.Namespace, count: int, way: str, layers: int) -> dict[str, float]:
    """Peak resident bytes of a rank in three steps, above what it held before the model was made; collective."""
    import torch
    import torch.distributed as dist

    tiny = build_model(64, 1, 32)  # for what it imports
    tiny("det", torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)).backward()
    before = _resident("VmRSS")
    shape = argparse.Namespace(**{**vars(args), "layers": layers})
    step = make_step(way, tuple(f"task{i}" for i in range(count)), shape)
    for _ in range(3):
        step()
    most = torch.tensor(_resident("VmHWM") - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"peak": int(most)}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


# ---- ranks: forks of one process that has imported everything ----


@contextlib.contextmanager
def hosts(ranks: int, rate: str | None) -> Iterator[list[str | None]]:
    """The network namespace of every rank: two joined by a link of `rate`, one for all, or (without root) none."""
    if rate:
        with two_hosts(rate) as names:
            yield [names[rank * 2 // ranks] for rank in range(ranks)]
    elif os.geteuid() == 0:
        name = f"peers{os.getpid()}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        try:
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
            yield [name] * ranks
        finally:
            subprocess.run(["ip", "netns", "delete", name], check=False)
    else:
        yield [None] * ranks


def on_ranks(places: Sequence[str | None], rate: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on so many ranks; what it returned on rank 0."""
    context = get_context("fork")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [
        context.Process(target=_rank, args=(rank, places, rate, port, results, function, *arguments))
        for rank in range(len(places))
    ]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs) and results.empty():
        if any(job.exitcode for job in jobs):
            for job in jobs:
                job.terminate()
            raise SystemExit(f"a rank of {function.__name__}{arguments[1:]} failed")
        time.sleep(0.05)
    found = results.get()
    for job in jobs:
        job.join()
    return found


def _rank(rank: int, places: Sequence[str | None], rate: str | None, port: int, results: Any,
          function: Callable[..., Any], *arguments: Any) -> None:  # fmt: skip
    place = places[rank]
    if place is not None:
        with open(f"/run/netns/{place}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {place}")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(places)), "MASTER_PORT": str(port),
        "MASTER_ADDR": FIRST_HOST if rate else "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth0" if rate else "lo",
    }  # fmt: skip
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    found = function(*arguments)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _import_all() -> None:
    """What the ranks need, here once. No operation of torch may run before the forks: its threads would be missed."""
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


# ---- the tables ----


def parameters_of(width: int, layers: int, size: int, count: int) -> int:
    """Elements of the model."""
    model = build_model(width, layers, size, tuple(f"task{i}" for i in range(count)))
    return sum(p.numel() for p in model.parameters())


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a number of tasks, of ranks, and way."""
    for ranks in args.ranks:
        with hosts(ranks, args.rate) as places:
            for count in args.tasks:
                found = on_ranks(places, args.rate, seconds_and_bytes, args, count)
                for way, row in found.items():
                    ratios = sorted(b / a for a, b in zip(found["plain"]["seconds"], row["seconds"], strict=True))
                    quarter = len(ratios) // 4
                    memory = {} if args.rate else on_ranks(places, None, peak, args, count, way, args.layers)
                    yield {
                        "tasks": count, "ranks": ranks, "way": way, "rate": args.rate,
                        "seconds": statistics.median(row["seconds"]), "ratio": statistics.median(ratios),
                        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                        "sent": row["sent"] if places[0] else None, **memory,
                    }  # fmt: skip


def capacities(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The largest model, in parameters, that keeps a rank within `LIMIT`; width, batch and tasks stay as they are."""
    shallow, deep = args.layers, args.layers * 4
    for ranks in args.capacity:
        with hosts(ranks, None) as places:
            for count in (args.tasks[0], args.tasks[-1]):
                sizes = [parameters_of(args.width, layers, args.size, count) for layers in (shallow, deep)]
                for way in ways_for(ranks):
                    peaks = [on_ranks(places, None, peak, args, count, way, n)["peak"] for n in (shallow, deep)]
                    a_byte = (sizes[1] - sizes[0]) / (peaks[1] - peaks[0])
                    most = sizes[0] + a_byte * (LIMIT - peaks[0])
                    yield {"tasks": count, "ranks": ranks, "way": way, "parameters": round(most), "sizes": sizes,
                           "peaks": peaks}  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory on one rank, and seconds on every number of ranks, over the number of tasks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = sorted({row["ranks"] for row in rows})
    figure, axes = plt.subplots(2, len(ranks), figsize=(4.2 * len(ranks), 6.4), squeeze=False, sharex=True)
    for column, number in enumerate(ranks):
        for way in ways_for(number):
            mine = [row for row in rows if row["ranks"] == number and row["way"] == way]
            style = {"marker": "o", "markersize": 3, "color": f"C{(ENGINES + LOCAL).index(way)}", "label": way}
            axes[0, column].plot([r["tasks"] for r in mine], [r["ratio"] for r in mine], **style)
            axes[1, column].plot([r["tasks"] for r in mine], [r["peak"] / 2**20 for r in mine], **style)
        axes[0, column].set_title(f"{number} rank{'s' if number > 1 else ''}")
        axes[1, column].set_xlabel("tasks")
    axes[0, 0].set_ylabel("seconds a step / plain DeepSpeed's")
    axes[1, 0].set_ylabel("peak MiB a rank")
    axes[0, 0].legend(fontsize=7)
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 3, 5, 8])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--capacity", type=int, nargs="*", default=[1, 2], help="ranks that capacity is measured on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rate", help="join two hosts by a link of this rate, for example 400mbit (needs root)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"DS_LOG_LEVEL": "error", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}

    _import_all()
    start, rows, most = time.perf_counter(), [], []
    print("| tasks | ranks | way | s a step | of plain | quartiles | MB sent a rank | peak MiB a rank |")
    print("|---" * 8 + "|", flush=True)
    for row in rows_of(args):
        rows.append(row)
        low, high = row["quartiles"]
        sent = "" if row["sent"] is None else f"{row['sent'] / 1e6:.1f}"
        held = f"{row['peak'] / 2**20:.0f}" if "peak" in row else ""
        print(f"| {row['tasks']} | {row['ranks']} | {row['way']} | {row['seconds']:.2f} | {row['ratio']:.2f} "
              f"| {low:.2f}-{high:.2f} | {sent} | {held} |", flush=True)  # fmt: skip
    if args.capacity and not args.rate:
        print("\n| tasks | ranks | way | largest model in 4 GiB a rank, M parameters |\n|---|---|---|---|", flush=True)
        for row in capacities(args):
            most.append(row)
            print(f"| {row['tasks']} | {row['ranks']} | {row['way']} | {row['parameters'] / 1e6:.0f} |", flush=True)
    if args.json:
        shape = {name: getattr(args, name) for name in ("rounds", "batch", "width", "layers", "size", "rate")}
        found = {"machine": describe_machine(), "took": time.perf_counter() - start, "shape": shape, "rows": rows}
        args.json.write_text(json.dumps({**found, "capacity": most}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
