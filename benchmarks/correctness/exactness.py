"""Does balanced training on every kind of engine reach the weights of a float64 single-process reference?

    python -m benchmarks.correctness.exactness          # every case on 1, 2 and 4 ranks: the table in docs/exactness.md
    python -m benchmarks.correctness.exactness --world 2 --only zero2

All runs take about an hour on 2 cores; `--world 2 --only "zero2 fp32" --weighting tbgc` takes half a minute. With
`--json` a run is written to the file when it is done, those that are in it are not run again, and the tables show all
of them: the same command continues one that was interrupted. Delete the file to measure all of them again.

Each case takes 5 SGD steps on 3 tasks whose losses differ by a factor of 3,000 and compares all weights and norms.
For fp32 the figure is the largest absolute difference of a weight from float64. 16-bit rows are compared with the same
steps computed by hand in that type (forward and backward in 16 bit, sums in float64), relative to the largest change
of a weight.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from allinone_ds.atomic_file import write_atomically
from allinone_ds.testing.cases import MICRO_STEPS, WEIGHTINGS, all_cases, weightings_for
from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.report import make_parser, print_head, print_row


def run_cases(args: argparse.Namespace) -> list[dict]:
    """Return one row per case, weighting and number of micro-steps. Call on every rank."""
    import deepspeed
    import torch.distributed as dist

    from benchmarks.correctness.balanced_case import run_case

    # DeepSpeed refuses fp16 on CPUs without fp16 instructions; PyTorch computes it there nevertheless, more slowly.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    world = dist.get_world_size()
    known = read_rows(args.json)
    done = {_key(row) for row in known}
    dist.barrier()  # every rank has read the file
    rows = []
    for case in all_cases():
        if args.only and not any(word in case.name for word in args.only):
            continue
        for weighting in args.weighting or weightings_for(case):
            for label, micro_steps in MICRO_STEPS.items():
                if (case.name, weighting, label, world) in done:
                    continue
                result = run_case(case, WEIGHTINGS[weighting], micro_steps)
                rows.append({"case": asdict(case), "rounds": case.rounds, "weighting": weighting, "micro_steps": label,
                             "world": world, **result})  # fmt: skip
                if dist.get_rank() == 0:
                    write_rows(args.json, [*known, *rows])
                    print(f"{case.name:42s} {weighting:16s} {label} R={rows[-1]['world']} "
                          f"weights {result['weights']:.1e} (of update {result['weights_relative']:.1e}) "
                          f"norms {result['norms']:.1e}", flush=True)  # fmt: skip
    return rows


def read_rows(file: Path | None) -> list[dict]:
    """Return the runs in a record; none without one."""
    return json.loads(file.read_text()) if file is not None and file.is_file() else []


def write_rows(file: Path | None, rows: list[dict]) -> None:
    """Write runs in the order of their cases; do nothing without a file."""
    if file is not None:
        order = {case.name: place for place, case in enumerate(all_cases())}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(sorted(rows, key=lambda row: order[row["case"]["name"]])) + "\n")


def _key(row: dict) -> tuple[str, str, str, int]:
    return row["case"]["name"], row["weighting"], row["micro_steps"], row["world"]


def print_tables(rows: list[dict]) -> None:
    """Print the largest differences by engine and number of ranks, and by weighting and ZeRO stage."""
    worlds = sorted({row["world"] for row in rows})
    names = dict.fromkeys(row["case"]["name"] for row in rows)
    print_head("engine", *(f"R = {world}" for world in worlds), "norms", "runs")
    for name in names:
        of_name = [row for row in rows if row["case"]["name"] == name]
        cells = [_largest([row for row in of_name if row["world"] == world]) for world in worlds]
        print_row(name, *cells, f"{max(row['norms'] for row in of_name):.1e}", len(of_name))
    print()
    stages = [name for name in names if name in {f"zero{stage} fp32" for stage in range(4)}]
    print_head("weighting", "micro-steps", *stages)
    for weighting in WEIGHTINGS:
        for label in MICRO_STEPS:
            found = [row for row in rows if (row["weighting"], row["micro_steps"]) == (weighting, label)]
            if any(row["weighting"] == weighting for row in rows):
                cells = [_largest([row for row in found if row["case"]["name"] == stage]) for stage in stages]
                print_row(weighting, label, *cells)


def _largest(rows: list[dict]) -> str:
    if not rows:
        return ""
    return f"{max(row['weights' if row['rounds'] == 'fp32' else 'weights_relative'] for row in rows):.1e}"


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--weighting", nargs="*", default=[], choices=list(WEIGHTINGS), help="only these weightings")
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, lambda: run_cases(args))
        return
    rows = []
    for world in args.world:
        rows += measure_on_ranks(__spec__.name, sys.argv[1:], world)
    print_tables(read_rows(args.json) or rows)


if __name__ == "__main__":
    main()
