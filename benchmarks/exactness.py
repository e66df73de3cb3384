"""Print the exactness table: balanced training on every kind of engine against a float64 single-process reference.

    python benchmarks/exactness.py                 # every case on 1, 2 and 4 ranks: the table in docs/exactness.md
    python benchmarks/exactness.py --world 2 --only zero2

Each case takes 5 SGD steps on 3 tasks whose losses differ by 3,000x and compares all weights and norms.
The figure for fp32 is the largest difference of a weight from float64. 16-bit rows are compared with the same steps
done by hand in that type (forward and backward in 16 bit, sums in float64), relative to the largest change of a weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from allinone_ds.testing.cases import MICRO_STEPS, WEIGHTINGS, all_cases, weightings_for


def _worker(args: argparse.Namespace) -> None:
    import deepspeed
    import torch.distributed as dist

    from allinone_ds import TaskBalancer, weighting_from_config
    from allinone_ds.testing import exactness, toy
    from allinone_ds.zero.params import whole_master

    def make_balancer(engine, weighting, parallel):
        return TaskBalancer(engine, toy.TASKS, "backbone", weighting_from_config(weighting), parallel=parallel)

    run_case = partial(exactness.run_case, make_balancer=make_balancer, whole_master=whole_master)
    deepspeed.init_distributed()
    # DeepSpeed refuses fp16 on CPUs without fp16 instructions; torch computes it there all the same, only slower
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    rows = []
    for case in all_cases():
        if args.only and not any(word in case.name for word in args.only):
            continue
        for weighting in args.weighting or weightings_for(case):
            for label, micro_steps in MICRO_STEPS.items():
                result = run_case(case, WEIGHTINGS[weighting], micro_steps)
                rows.append({"case": asdict(case), "weighting": weighting, "micro_steps": label,
                             "world": dist.get_world_size(), **result})  # fmt: skip
                if dist.get_rank() == 0:
                    print(f"{case.name:42s} {weighting:16s} {label} R={rows[-1]['world']} "
                          f"weights {result['weights']:.1e} (of update {result['weights_relative']:.1e}) "
                          f"norms {result['norms']:.1e}", flush=True)  # fmt: skip
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(rows))
    dist.barrier()


def launch(world: int, only: list[str], weighting: list[str], out: Path) -> list[dict]:
    """Run the cases on `world` ranks through torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
               "--worker", "--out", str(out), "--only", *only, "--weighting", *weighting]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    return json.loads(out.read_text())


def table(rows: list[dict]) -> str:
    """Two markdown tables: engines by world size (worst over weightings, micro-steps), and weightings by ZeRO stage."""
    worlds = sorted({row["world"] for row in rows})
    names = dict.fromkeys(row["case"]["name"] for row in rows)
    lines = [_row(["engine", *(f"R = {w}" for w in worlds), "norms", "runs"]), "|---" * (len(worlds) + 3) + "|"]
    for name in names:
        mine = [row for row in rows if row["case"]["name"] == name]
        cells = [_worst([r for r in mine if r["world"] == w]) for w in worlds]
        lines.append(_row([name, *cells, f"{max(r['norms'] for r in mine):.1e}", str(len(mine))]))
    stages = [n for n in names if n in {f"zero{stage} fp32" for stage in range(4)}]
    labels = [(w, m) for w in WEIGHTINGS for m in MICRO_STEPS if any(r["weighting"] == w for r in rows)]
    lines += ["", _row(["weighting", "micro-steps", *stages]), "|---" * (len(stages) + 2) + "|"]
    for weighting, micro_steps in labels:
        mine = [r for r in rows if (r["weighting"], r["micro_steps"]) == (weighting, micro_steps)]
        lines.append(
            _row([weighting, micro_steps, *(_worst([r for r in mine if r["case"]["name"] == s]) for s in stages)])
        )
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _worst(rows: list[dict]) -> str:
    keys = {"fp32": "weights"}
    return f"{max(r[keys.get(r['case']['dtype'], 'weights_relative')] for r in rows):.1e}" if rows else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--weighting", nargs="*", default=[], choices=list(WEIGHTINGS), help="these weightings only")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in args.world:
            rows += launch(world, args.only, args.weighting, Path(folder) / f"{world}.json")
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
