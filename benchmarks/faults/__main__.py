"""Break a tiny run in every way we know, go on from its checkpoint, and compare with a run that nothing happened to.

    python benchmarks/faults --json benchmarks/results/faults.json     # the table of docs/reliability.md
    python benchmarks/faults --only kill --kills 8                     # rows whose name holds the word
    python benchmarks/faults --async                                   # checkpoints are written in the background

"Lost nothing" means: the run was found and resumed without help and ended with the same weights and the same logged
losses, norms and rates as the unbroken run, bit for bit (2 ranks, CPU, fp32), and, where the fault is to be named, it
was. With --async the unbroken run saves in the step, the others in the background, where a checkpoint is written only
after the next step has been trained. With --json every try is written down at once, and the same command goes on where
it was cut off.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import Lost, NotPossible
from ranks import import_everything
from table import Row, markdown, rows
from tries import Tries


def attempt(bench: Tries, row: Row, seed: int) -> None:
    """One try of a row, or several in one run; notes what came out."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kill -9 at so many moments in all (100)")
    parser.add_argument("--times", type=int, default=6, help="tries of every other row with a random moment or file")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--async", action="store_true", dest="background", help="save in the background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--once", action="store_true", help="10 kills, every other row once, with ZeRO-2")
    parser.add_argument("--json", type=Path, help="write the table there after every try, and go on from it")
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
    asked_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_end.append(number))
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
                    if asked_to_end:
                        print("ended by SIGTERM; the same command with --json goes on", file=sys.stderr, flush=True)
                        return 1
        finally:
            bench.close()
    save(True)
    print(markdown(chosen))
    return 0 if all(row.kept == row.tried for row in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
