"""Does balancing improve the trained model? The ladder of methods of arXiv 2307.03465 and its neighbours, over 5 seeds.

    apt-get install dataset-fashion-mnist
    pip download --no-deps deepforest
    python -m benchmarks.ladder --jobs 2 --deepforest deepforest-*.whl     # all runs; the same command resumes
    python -m benchmarks.ladder --only adamw                               # a part of them
    python -m benchmarks.ladder --table --page docs/evidence.md            # only the tables and plots of the records

The 316 runs take about 9 hours of one core (96 under AdamW: 2.2 hours); tables and plots take 10 seconds.

Every run is the package's own trainer on one rank and one core (one GPU with --size gpu) in a process of its own, and
appends one line to benchmarks/results/ladder_SIZE.jsonl. A run with a valid record is not trained again; a record that
cannot be read, is incomplete or was made with other settings counts as missing.

First, each method's learning rate is chosen: three rates (SGD: five), one seed, scored on the validation split by the
mean of mAP50, mIoU and top-1 (single-task models: by their own metric). The best rate is used for the five seeds that
are scored on the test split. All methods run with one seed before the next seed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from allinone_ds.training.launcher import gpu_count
from benchmarks.common.launch import ROOT
from benchmarks.ladder.plots import write_plots
from benchmarks.ladder.records import Records, base_runs
from benchmarks.ladder.runs import Runner
from benchmarks.ladder.table import report, write_page

PARTS = {
    "adamw": ("composed", "adamw"), "sgd": ("composed", "sgd"), "native": ("native", "adamw"),
    "muon": ("composed", "muon"), "joint": ("joint", "adamw"),
}  # fmt: skip
"""Name of a part of the ladder -> its data and optimizer."""
DEFAULT = tuple(name for name in PARTS if name != "muon")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu", help="of the runs (default: cpu)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(PARTS),
        default=DEFAULT,
        help=f"parts of the ladder (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core (default: 1)")
    parser.add_argument(
        "--deepforest", type=Path, metavar="WHEEL", help="for the native part, which is left out without it"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps per run, for a try (with another --results)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ladder"), help="folder for data and runs (default: runs/ladder)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the records")
    parser.add_argument("--table", action="store_true", help="print the tables without training")
    parser.add_argument("--page", type=Path, help="write the tables into this page, and the plots into its folder")
    args = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # ends the runs that are being trained as well
    bases = base_runs(args.size)
    for base in bases.values() if args.steps else ():
        base["trainer"] |= {"max_steps": args.steps, "logging_steps": min(args.steps, base["trainer"]["logging_steps"])}
    records = Records(args.results / f"ladder_{args.size}.jsonl", bases, args.size)
    blocks = [PARTS[name] for name in args.only if PARTS[name][0] in bases]
    if not args.table:
        possible = [(data, optimizer) for data, optimizer in blocks if data != "native" or args.deepforest is not None]
        runner = Runner(records, args.work / args.size, args.deepforest, args.size == "gpu" and gpu_count() > 0)
        runner.run(possible, args.jobs)
    text = report(records, blocks)
    print(text)
    if args.page:
        plots = write_plots(records, args.page.parent / "images")
        pictures = "".join(f"\n![{shows}](images/{file.name})\n\n*{shows}.*\n" for file, shows in plots.items())
        write_page(args.page, text + pictures)


if __name__ == "__main__":
    main()
