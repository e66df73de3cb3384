"""What does a first GPU show: is it exact, how fast, what fits, where does it wait?

    python -m benchmarks.gpu --out DIR                          # at most 9.5 minutes; the parts most worth first
    python -m benchmarks.gpu --out DIR --only exact steps       # some parts
    python -m benchmarks.gpu --out DIR --device cpu             # small sizes: does every part run? 8 minutes on 2 cores
    python -m benchmarks.gpu --out DIR --table                  # writes docs/gpu-measured.md from the records in DIR

Each part runs in a process of its own, which is ended after its time limit; what it had found by then is kept. On a GPU
the parts that measure no time run first, all at once. DIR gets one file per part with one JSON object per line, a log,
and `parts.jsonl` with how each part ended. A machine without a
network needs the wheels of `make gpu-wheels` besides torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import PARTS, Run, end_tree


def run_part(name: str, run: Run) -> int:
    """Write what a part measures to its file, row by row; return 1 if a row tells of an error, else 0.

    Called in the part's process.
    """
    module, failed = importlib.import_module(f"benchmarks.gpu.{name}"), False
    with (run.folder / f"{name}.jsonl").open("w") as rows:
        for row in module.measure(run):
            rows.write(json.dumps({"part": name, **row}) + "\n")
            rows.flush()
            print(row, flush=True)
            failed |= "error" in row or row.get("passed") is False or bool(row.get("status"))
    return int(failed)


def start_part(name: str, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; return how it ended."""
    from allinone_ds.training.launcher import QUIET, free_port
    from benchmarks.common.launch import worker_environment

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**QUIET, **os.environ, **worker_environment(), **alone, "MASTER_PORT": str(free_port())}
    environment["DS_ACCELERATOR"] = device
    environment.pop("TORCH_CUDA_ARCH_LIST", None)  # DeepSpeed 0.19.8 fails to read "9.0a", and asks the GPU without it
    if device == "cpu" or not PARTS[name].alone:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", f"--part={name}", f"--device={device}"]
    command += [f"--out={folder}", f"--seconds={seconds:.0f}"]
    began = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            status = "ok" if job.wait(seconds) == 0 else f"failed ({job.returncode})"
        except subprocess.TimeoutExpired:
            end_tree(job.pid)
            job.wait()
            status = "time limit"
    file = folder / f"{name}.jsonl"
    rows = len(file.read_text().splitlines()) if file.exists() else 0
    return {"part": name, "status": status, "seconds": round(time.monotonic() - began, 1), "rows": rows}


def main() -> int:
    """Run the command line; return the number of parts that did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together (default: 9.5)")
    parser.add_argument("--table", action="store_true", help="only write docs/gpu-measured.md from the records")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        from benchmarks.gpu.table import write_page

        write_page(args.out)
        return 0
    if args.part:
        return run_part(args.part, Run(args.device, args.out, args.seconds))
    end, failed = time.monotonic() + 60 * args.minutes, 0

    def ended(name: str) -> dict[str, Any]:
        limit = PARTS[name].seconds * (1 if args.device == "cuda" else 2)  # a slow machine is no reason to fail a trial
        seconds = min(limit, end - time.monotonic())
        if seconds < 5:
            return {"part": name, "status": "no time left", "seconds": 0.0, "rows": 0}
        return start_part(name, args.device, args.out, seconds)

    together = [name for name in args.only if args.device == "cuda" and not PARTS[name].alone]
    with ThreadPoolExecutor(len(together) or 1) as pool:
        for part in chain(pool.map(ended, together), map(ended, (name for name in args.only if name not in together))):
            failed += part["status"] != "ok"
            print(f"{part['part']:8s} {part['status']:12s} {part['seconds']:6.1f} s {part['rows']:4d} rows", flush=True)
            with (args.out / "parts.jsonl").open("a") as parts:
                parts.write(json.dumps(part) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
