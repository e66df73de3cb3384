"""What do the messages cost in which ranks compare what they do, at 2 to 8 processes and by formula at 1,024?

    python -m benchmarks.speed.messages
    python -m benchmarks.speed.messages --hop 30       # microseconds per hop of another network

A message is an all-reduce of 32 bytes and two carried numbers over gloo: a ring, whose latency is 2 (R - 1) hops on R
ranks. The hop is measured on this machine as the slope over R of the least time of many messages; with more processes
than cores it holds the time to switch to the next process too. A step of T tasks with K micro-steps sends one message
if it goes as the one before, and (K + 2) T + 2 of them otherwise (ZeRO 2 and 3); before, every step sent all of these
and one for signals, and waited for each.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from benchmarks.common.forked_function import call_on_ranks
from benchmarks.common.report import make_parser, print_head, print_row, write_record


def measure(repeats: int) -> list[float]:
    """Return the seconds of messages between the ranks, sorted. Call on every rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    seconds = []
    for _ in range(repeats):
        message = torch.tensor([1, -1, 0, 0, 0, 0])
        start = time.perf_counter()
        dist.all_reduce(message, dist.ReduceOp.MAX, async_op=True).wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[repeats // 5 :])


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="measured (default: 2 3 4 6 8)")
    parser.add_argument("--computed", type=int, nargs="+", default=[64, 256, 1024], help="default: 64 256 1024")
    parser.add_argument("--hop", type=float, help="microseconds per hop for the computed rows; default: as measured")
    parser.add_argument("--repeats", type=int, default=300, help="messages per number of ranks (default: 300)")
    parser.add_argument("--tasks", type=int, default=3, help="tasks per step (default: 3)")
    parser.add_argument("--micro-steps", type=int, default=1, help="micro-steps per task (default: 1)")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    import deepspeed  # noqa: F401  # once, before the ranks are forked

    from allinone_ds.zero.kernels import spare_cpu_kernel

    spare_cpu_kernel()
    found = {ranks: call_on_ranks([None] * ranks, None, measure, args.repeats) for ranks in args.ranks}
    hops = np.array([2 * (ranks - 1) for ranks in found])
    least = np.array([seconds[0] for seconds in found.values()])
    hop, start = np.polyfit(hops, least, 1)
    every = (args.micro_steps + 2) * args.tasks + 3
    print_head("ranks", "hops", "one message, ms", "by formula, ms", f"{every} messages, waited for, ms")
    rows: list[dict[str, Any]] = []
    for ranks in [*found, *args.computed]:
        used = hop if args.hop is None or ranks in found else args.hop / 1e6
        formula = start + 2 * (ranks - 1) * used
        row = {"ranks": ranks, "measured": found[ranks][0] if ranks in found else None, "formula": formula}
        rows.append(row)
        measured = f"{row['measured'] * 1e3:.2f}" if ranks in found else ""
        print_row(ranks, 2 * (ranks - 1), measured, f"{formula * 1e3:.2f}", f"{every * formula * 1e3:.1f}")
    write_record(args.json, hop_seconds=float(hop), start_seconds=float(start), messages_before=every, rows=rows)


if __name__ == "__main__":
    main()
