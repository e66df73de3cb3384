"""Bytes and memory of a step by formula: checked where ranks can be started, then written down for 1,024 GPUs.

    python benchmarks/scale.py                              # both; the table of docs/scale.md
    python benchmarks/scale.py --ranks --gpus 64 1024       # formulas alone

The formulas are those of `allinone-ds plan` (`allinone_ds/training/plan.py`). Measured are, on CPU ranks in a network
namespace of their own, the bytes that cross its loopback device in a step (with all headers), for each rank, and the
bytes that the balancer says it keeps. A namespace of one's own needs root or user namespaces (`unshare --net`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine, sent_bytes
from overhead import TASKS, build_engine

WAYS = ("plain", "exact", "sketch", "delayed")
SHAPE = (256, 4, 32)  # width, layers, image side: 3M parameters, little to compute
LARGE = {"backbone": 1_100_000_000, "head": 20_000_000}
LIMITS = {"stage3_max_live_parameters": 2 * 10**9, "stage3_max_reuse_distance": 4 * 10**9}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def measure() -> list[dict]:
    """One row a stage and way: bytes sent by a rank in a step, and what the balancer keeps. Collective."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer
    from allinone_ds.balance.sketch import default_size
    from allinone_ds.planning.memory import Sizes, memory_parts, moved_parts
    from allinone_ds.run_config.engine_settings import read_engine

    world, rows = dist.get_world_size(), []
    x, y = torch.randn(1, 3, SHAPE[2], SHAPE[2]), torch.zeros(1, dtype=torch.long)
    for stage in (1, 2, 3):
        for way in WAYS:
            engine, _ = build_engine(stage, len(TASKS) if way == "plain" else 1, *SHAPE, 1)
            heads = {task: _elements(engine.module.heads[task]) for task in TASKS}
            sizes = Sizes(_elements(engine.module.backbone), heads, dict.fromkeys(TASKS, 1))
            balancer = None if way == "plain" else TaskBalancer(engine, TASKS, "backbone", TBGC(0.1), norm=way)

            def step(engine=engine, balancer=balancer) -> None:
                if balancer is None:
                    for task in TASKS:
                        engine.backward(engine(task, x, y))
                        engine.step()
                    return
                for task in TASKS:
                    with balancer.task(task):
                        balancer.backward(engine(task, x, y))
                balancer.step()

            for _ in range(2):
                step()
            dist.barrier()
            before = sent_bytes()
            dist.barrier()
            for _ in range(3):  # a whole number of rounds of DeepSpeed's traces
                step()
            dist.barrier()
            sent = (sent_bytes() - before) / 3 / world
            plan = dataclasses.replace(read_engine(engine.config), all_reduces=True)  # gloo's reduce-scatter is one
            sketch = default_size(sizes.trained)
            moved = sum(moved_parts(plan, sizes, world, way, sketch).values())
            kept = 0 if way == "plain" else memory_parts(plan, sizes, world, way, 2, 1, sketch)[0]["balancer"]
            rows.append({"stage": stage, "way": way, "ranks": world, "sent": sent, "sent_by_formula": moved,
                         "kept": balancer.extra_bytes if balancer else 0, "kept_by_formula": kept})  # fmt: skip
            engine.destroy()
    return rows


def _elements(module) -> int:
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters() if p.requires_grad)


def on_paper(gpus: int) -> list[dict]:
    """Memory (without activations) and bytes sent by one GPU of `gpus`, for a large model in bf16 with AdamW."""
    from allinone_ds.balance.sketch import default_size
    from allinone_ds.planning.memory import Sizes, memory_parts, moved_parts
    from allinone_ds.run_config.engine_settings import read_engine

    sizes = Sizes(LARGE["backbone"], dict.fromkeys(TASKS, LARGE["head"]), dict.fromkeys(TASKS, 1))
    sketch, rows = default_size(sizes.trained), []
    for stage, settings in ((1, {}), (2, {}), (3, {}), (3, LIMITS)):
        zero = {"stage": stage, "reduce_bucket_size": 50_000_000, **settings}
        engine = read_engine({"zero_optimization": zero, **BF16})
        for way in WAYS:
            if settings and way == "plain":
                continue  # nothing of it is kept over a change of task
            if engine.wraps_bf16 and way in ("sketch", "delayed"):
                continue  # refused: that engine keeps its own whole gradient
            norm = "exact" if way == "plain" else way
            memory, _ = memory_parts(engine, sizes, gpus, norm, 2, 1, sketch)
            if way == "plain":
                memory["balancer"] = 0
            moved = moved_parts(engine, sizes, gpus, way, sketch)
            way = f"{way}, weights kept over the step" if settings else way
            rows.append({"gpus": gpus, "stage": stage, "way": way, "memory": memory, "moved": moved})
    return rows


def launch(ranks: int) -> list[dict]:
    """Measure on so many ranks, in a network namespace that nobody else uses."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
        words = ['ip link set lo up; exec "$@"', "sh", *run, __file__, f"--worker={out}"]
        spaces = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        subprocess.run([*spaces, "sh", "-c", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="measure on so many (default 2 and 4)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1024], help="and write down for so many")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed()
        rows = measure()
        if dist.get_rank() == 0:
            args.worker.write_text(json.dumps(rows))
        dist.barrier()
        dist.destroy_process_group()
        return
    measured = [row for ranks in args.ranks for row in launch(ranks)]
    if measured:
        print("| ranks | ZeRO | way | MB sent by a rank | by formula | MB the balancer keeps | by formula |")
        print("|---|---|---|---|---|---|---|")
    for row in measured:
        print(f"| {row['ranks']} | {row['stage']} | {row['way']} | {row['sent'] / 1e6:.1f} "
              f"| {row['sent_by_formula'] / 1e6:.1f} | {row['kept'] / 1e6:.2f} | {row['kept_by_formula'] / 1e6:.2f} |",
              flush=True)  # fmt: skip
    paper = [row for gpus in args.gpus for row in on_paper(gpus)]
    if paper:
        print("\n| GPUs | ZeRO | way | GB of weights | gradients | optimizer | balancer | buffers | all | GB sent "
              "| of it gradients | weights | MB for norms |\n" + "|---" * 13 + "|")  # fmt: skip
    for row in paper:
        memory, moved = row["memory"], row["moved"]
        parts = [memory[part] / 1e9 for part in ("weights", "gradients", "optimizer", "balancer", "buffers")]
        cells = [f"{part:.3f}" if 0 < part < 0.1 else f"{part:.2f}" for part in (*parts, sum(parts))]
        weights = moved.get("weights", 0) + moved.get("new weights", 0)
        cells += [f"{part / 1e9:.2f}" for part in (sum(moved.values()), moved["gradients"], weights)]
        print(f"| {row['gpus']} | {row['stage']} | {row['way']} | {' | '.join(cells)} | {moved['norms'] / 1e6:.3f} |")
    if args.json:
        found = {"machine": describe_machine(), "measured": measured, "on_paper": paper}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
