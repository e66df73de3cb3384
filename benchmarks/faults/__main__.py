"""Does a run lose anything when it is killed, stopped, moved to other ranks or damaged?

    python -m benchmarks.faults --json benchmarks/results/faults.json     # the table of docs/reliability.md: 11 minutes
    python -m benchmarks.faults --only kill --kills 8                     # rows whose name contains the word
    python -m benchmarks.faults --async                                   # checkpoints are written in the background

A tiny run is broken in each of these ways, resumed from its last checkpoint, and compared with an unbroken run. "Lost
nothing" means that the run resumed without help and ended with bitwise the same weights and logged losses, norms and
rates as the unbroken run (2 ranks, CPU, fp32), and that it reported the fault where it has to.

With --async the unbroken run saves in the step and the others in the background, where each checkpoint is delayed until
the next step has been trained. With --json the result of every try is written immediately, and the same command
continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common.forked_run import import_everything
from benchmarks.faults.bench import Lost, NotPossible
from benchmarks.faults.table import Row, markdown, rows
from benchmarks.faults.tries import Tries


def attempt(bench: Tries, row: Row, seed: int) -> None:
    """Make one attempt of a row, which is one try or several in one run, and note the result in the row."""
    bench.stage = row.stages[row.attempts % len(row.stages)]
    bench.random.seed(f"{seed} {row.fault} {row.attempts}")
    bench.in_save = 0
    row.attempts += 1
    begun = time.monotonic()
    try:
        tries = row.attempt(bench, row.times - row.tried)
        row.kept += 1 if tries is None else tries
    except NotPossible as error:
        row.notes.append(str(error))
        row.times = tries = 0
    except (Lost, TimeoutError) as error:
        tries = error.tries if isinstance(error, Lost) else 1
        row.notes.append(f"ZeRO-{bench.stage}: {error}")
    finally:
        bench.close()
    row.tried += 1 if tries is None else tries
    row.in_save += bench.in_save
    row.seconds += time.monotonic() - begun


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kill -9 in total (default: 100)")
    parser.add_argument(
        "--times", type=int, default=6, help="tries per other row with a random moment or file (default: 6)"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--async", action="store_true", dest="background", help="save in the background")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and files (default: 0)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="ZeRO stages (default: 1 2 3)")
    parser.add_argument("--once", action="store_true", help="make 10 kills and try each other row once, with ZeRO-2")
    parser.add_argument("--json", type=Path, help="write the rows to this file after every try, and continue from it")
    args = parser.parse_args()
    table = rows(args.kills, args.times, tuple(args.stages), args.once)
    chosen = [row for row in table if any(word in row.fault for word in args.only)]
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    record = {"settings": settings, "finished": False, "starts": 0, "seconds": 0.0}
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text())
        if found["settings"] == settings and not found["finished"]:
            record = found
            for row, known in zip(chosen, record.pop("rows"), strict=True):
                row.restore(known)
    record["starts"] += 1
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    import_everything()
    begun, earlier = time.monotonic(), record["seconds"]

    def save(finished: bool) -> None:
        record.update(finished=finished, seconds=round(earlier + time.monotonic() - begun))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**record, "rows": [row.record() for row in chosen]}, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Tries(Path(folder), args.background)
        try:
            for number, row in enumerate(chosen, 1):
                while row.tried < row.times:
                    attempt(bench, row, args.seed)
                    save(False)
                    clock = f"{record['seconds'] // 60}:{record['seconds'] % 60:02}"
                    print(f"{clock}  row {number} of {len(chosen)}  {row.fault}: {row.kept} of {row.tried}",
                          file=sys.stderr, flush=True)  # fmt: skip
                    if terminated:
                        print("stopped by SIGTERM; with --json the same command continues", file=sys.stderr, flush=True)
                        return 1
        finally:
            bench.close()
    save(True)
    print(markdown(chosen))
    return 0 if all(row.kept == row.tried for row in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
