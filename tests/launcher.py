"""Runs functions of a worker script on several ranks through torchrun; each becomes a test of its own.

A worker module has `check_*` functions that every rank calls; a check fails when it raises on any rank. One launch runs
all of them, since starting ranks costs more than most checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(script: Path, world: int, folder: Path, *arguments: str, timeout: int = 600) -> dict[str, str]:
    """Start `script` on `world` CPU ranks; returns check name -> "" or the traceback of the first failing rank."""
    out = folder / f"{script.stem}-{world}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run(
        [*command, str(script), str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )
    if not out.exists():
        raise RuntimeError(
            f"{script.name} on {world} ranks left no result:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return json.loads(out.read_text())


def join_ranks() -> None:
    """Join the process group that torchrun set up, without compiling a kernel that only CPU inference calls."""
    import deepspeed

    from allinone_ds.zero.kernels import spare_cpu_kernel

    spare_cpu_kernel()
    deepspeed.init_distributed()


def run_checks(checks: dict[str, Callable[[], None]], out: str) -> None:
    """On each rank: call all checks in order, gather what each raised, write it on rank 0. Collective.

    A check that raises on one rank alone leaves the others in a collective that it never joins. The gathering has a
    group of its own, so the two never meet: it gives up after two minutes and the rank ends with what it raised.
    """
    import torch.distributed as dist

    join_ranks()
    gathering = dist.new_group(backend="gloo", timeout=timedelta(minutes=2))
    results = {}
    for name, check in checks.items():
        try:
            check()
            problem = ""
        except Exception:
            problem = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        every: list[str] = [""] * dist.get_world_size()
        try:
            dist.all_gather_object(every, problem, group=gathering)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: a rank did not come out of it. {problem or 'This rank passed.'}") from error
        results[name] = next((p for p in every if p), "")
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
