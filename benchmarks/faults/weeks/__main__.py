"""Does a run of weeks lose anything, or use more and more of a machine, when one fault follows another?

    sudo PYTHONPATH=. .venv/bin/python -m benchmarks.faults.weeks --hours 6 --out runs/weeks \
        --json benchmarks/results/weeks.json --plot docs/images/weeks.png
    python -m benchmarks.faults.weeks --list                  # the faults and how they are injected

Four ranks train three tasks on two hosts, two network namespaces in which `launch/torchrun.sh` runs as on two machines.
A seeded schedule of faults hits the run. Where a fault ends it, the same command starts it again on both hosts, as a
scheduler does. Then the same number of steps is trained without faults. The command fails, with a list, if

- a fault that the run should survive ends it, or one that ends it leaves a process or a rank that waits,
- a new start does not resume from the last checkpoint, or more steps are lost than lie between two checkpoints,
- any loss, norm or metric that the run logged differs in one bit from that of the run without faults, or a weight does,
- descriptors, threads, memory, checkpoints, temporary files or shared memory grow.

The time of the run without faults comes on top of --hours, usually half as much. If the command itself is interrupted
or killed, the same command continues.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.common.report import write_record
from benchmarks.faults.weeks.hosts import TwoHosts
from benchmarks.faults.weeks.result import draw, result, table
from benchmarks.faults.weeks.schedule import ENDED, SURVIVED
from benchmarks.faults.weeks.soak import Soak, Stopped
from launch.namespaces import two_hosts, what_is_missing


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0, help="of training under faults (default: 6)")
    parser.add_argument("--out", type=Path, default=Path("runs/weeks"), help="folder (default: runs/weeks; 1 GiB)")
    parser.add_argument("--gap", type=float, default=120.0, help="mean seconds before a fault (default: 120)")
    parser.add_argument("--sample", type=float, default=60.0, help="seconds between two samples (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default: 0)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--plot", type=Path, help="draw losses, progress and memory to this file")
    parser.add_argument("--list", action="store_true", help="print the faults and do nothing")
    args = parser.parse_args()
    if args.list:
        for title, kinds in (("the run goes on:", SURVIVED), ("the run ends and is started again:", ENDED)):
            print(title, *(f"  {kind:<18}{how}" for kind, how in kinds.items()), sep="\n")
        return 0
    if missing := what_is_missing(("unshare", "fsfreeze", "mkfs.ext4"), "util-linux, e2fsprogs"):
        print(missing, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the same command continues"))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with two_hosts(lambda folder: TwoHosts(folder, out)) as hosts:
        try:
            soak = Soak(hosts, out, {"seed": args.seed, "gap": args.gap, "sample": args.sample})
            hosts.make()
            soak.prepare()
            soak.train(args.hours)
            soak.undisturbed()
        except Stopped as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        found = result(out, hosts.disk)
    write_record(args.json, **found)
    if args.plot:
        draw(found, args.plot)
    print(table(found))
    print(f"\n{found['hours']:.2f} hours under faults, {found['steps']} steps, {found['entries']} log entries compared")
    print(*(f"VIOLATION: {text}" for text in found["violations"]), sep="\n")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
