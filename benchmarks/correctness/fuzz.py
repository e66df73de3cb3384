"""Does balanced training stay exact in loops that nobody wrote down? Programs drawn at random against float64.

    python -m benchmarks.correctness.fuzz --minutes 2 --seed 1
    python -m benchmarks.correctness.fuzz --program failure.json      # one program again, shrunk if it fails

A program is an engine (ZeRO stage, precision, offload, buckets, sub-groups), a model (tied, unused, frozen, shared
parameters), tasks in changing orders with changing micro-steps and batches, a weighting, norms, partial steps, errors,
tasks that are not finite, evaluation, and saving and loading, on 1, 2 or 3 forked ranks. Its norms, factors and weights
are compared with the same steps computed by hand in float64. A program that fails is shrunk to a smaller one and
written as a script that torchrun runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.report import make_parser, write_record

if TYPE_CHECKING:
    from benchmarks.correctness.fuzzing.program import Program

LIBRARIES = (
    "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "torch._dynamo", "torch._inductor.compile_fx",
    "torchjd.aggregation", "allinone_ds.balance.balancer", "benchmarks.correctness.fuzzing.reference",
)  # fmt: skip
"""What every program imports; importing takes longer than a program."""


def main() -> None:
    """Run the command line; the exit status is 1 when a program failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to draw programs (default: 2)")
    parser.add_argument("--programs", type=int, help="how many programs to draw, instead of --minutes")
    parser.add_argument("--seed", type=int, default=1, help="of the draws; the same seed draws the same programs")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a program may take (default: 60)")
    parser.add_argument("--shrink", type=int, default=60, help="programs tried to shrink a failure (default: 60)")
    parser.add_argument("--program", type=Path, help="run this program, as the fuzzer wrote it")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/fuzz"), help="folder of failures (default: runs/fuzz)"
    )
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    _import_libraries()
    programs, failures = _run_all(args)
    write_record(args.json, seed=args.seed, programs=programs, failures=failures)
    print(f"{programs} programs, {len(failures)} failures")
    sys.exit(1 if failures else 0)


def _import_libraries() -> None:
    """Import what ranks import, once, before they are forked."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage in each engine's constructor, which would visit every imported object


def _run_all(args: argparse.Namespace) -> tuple[int, list[dict]]:
    """Run programs until time is up; return how many, and what failed."""
    from benchmarks.correctness.fuzzing.on_ranks import fork_ranks, load_program
    from benchmarks.correctness.fuzzing.program import draw_program

    end = time.monotonic() + 60 * args.minutes
    count, failures = 0, []
    while True:
        if args.program:
            program = load_program(args.program.read_text())
        else:
            program = draw_program(random.Random(args.seed * 1_000_003 + count))
        problem = fork_ranks(program, args.timeout)
        count += 1
        if problem:
            print(f"program {count}: {_last_line(problem)}", flush=True)
            failures.append(_report_failure(program, problem, args, f"{args.seed}-{count}"))
        if count % 50 == 0:
            print(f"{count} programs, {len(failures)} failures", flush=True)
        if args.program or count == args.programs or (args.programs is None and time.monotonic() > end):
            return count, failures


def _report_failure(program: Program, problem: str, args: argparse.Namespace, name: str) -> dict:
    """Shrink a program that failed; write it, its script and what went wrong to the folder of failures."""
    from benchmarks.correctness.fuzzing.script import write_script

    program, problem = _shrink(program, problem, args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(program.to_dict(), indent=1) + "\n")
    script = args.output / f"{name}.py"
    script.write_text(write_script(program, problem))
    print(f"  smallest: {_last_line(problem)}\n  {script}", flush=True)
    return {"program": program.to_dict(), "problem": problem}


def _shrink(program: Program, problem: str, args: argparse.Namespace) -> tuple[Program, str]:
    """Return the smallest program found that fails in the same way, and what it says."""
    from benchmarks.correctness.fuzzing.on_ranks import fork_ranks
    from benchmarks.correctness.fuzzing.program import simpler_programs

    left, kind = args.shrink, _kind(problem)
    smaller = True
    while smaller:
        smaller = False
        for candidate in simpler_programs(program):
            if left == 0:
                return program, problem
            left -= 1
            found = fork_ranks(candidate, min(args.timeout, 20.0))
            if found and _kind(found) == kind:
                program, problem, smaller = candidate, found, True
                break
    return program, problem


def _kind(problem: str) -> str:
    """Return what a problem has in common with those of the same cause: a hang, or the type of the error."""
    return "hang" if problem.startswith("hang") else _last_line(problem).split(":")[0]


def _last_line(problem: str) -> str:
    return problem.split("\n")[0] if problem.startswith("hang") else problem.strip().split("\n")[-1]


if __name__ == "__main__":
    main()
