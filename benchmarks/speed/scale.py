"""Do the formulas of `allinone-ds plan` predict the bytes sent and the memory of a step, and what do 1,024 GPUs need?

    python -m benchmarks.speed.scale                          # both: the tables of docs/scale.md
    python -m benchmarks.speed.scale --ranks --gpus 64 1024   # only the formulas: 10 seconds

Measured on CPU ranks in a network namespace of their own: the bytes that cross its loopback device per step and rank
(with all headers), and the bytes that the balancer reports to hold. Creating the namespace needs root or user
namespaces (`unshare --net`). The formulas are in `allinone_ds/planning/memory.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.launch import serve, worker_environment
from benchmarks.common.machine import sent_bytes
from benchmarks.common.report import make_parser, print_head, print_row, write_record
from benchmarks.common.vit import TASKS, balanced_step, build_engine, build_model, count_parameters, plain_step

WAYS = ("plain", "exact", "sketch", "delayed")
SHAPE = (256, 4, 32)  # width, layers, image side: 3M parameters, little to compute
LARGE = {"backbone": 1_100_000_000, "head": 20_000_000}
LIMITS = {"stage3_max_live_parameters": 2 * 10**9, "stage3_max_reuse_distance": 4 * 10**9}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def measure() -> list[dict]:
    """Return, per stage and way, the bytes sent by a rank per step and held by the balancer. Call on every rank."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer
    from allinone_ds.balance.combiners.sketch import default_size
    from allinone_ds.planning.memory import Sizes, memory_parts
    from allinone_ds.planning.traffic import moved_parts
    from allinone_ds.run_config.engine_settings import read_engine

    world, rows = dist.get_world_size(), []
    x, y = torch.randn(1, 3, SHAPE[2], SHAPE[2]), torch.zeros(1, dtype=torch.long)
    for stage in (1, 2, 3):
        for way in WAYS:
            engine = build_engine(build_model(*SHAPE), stage, len(TASKS) if way == "plain" else 1, 1)
            heads = {task: count_parameters(engine.module.heads[task]) for task in TASKS}
            sizes = Sizes(count_parameters(engine.module.backbone), heads, dict.fromkeys(TASKS, 1))
            balancer = None if way == "plain" else TaskBalancer(engine, TASKS, "backbone", TBGC(0.1), norm=way)

            def step(engine=engine, balancer=balancer) -> None:
                if balancer is None:
                    plain_step(engine, TASKS, x, y)
                else:
                    balanced_step(balancer, x, y)

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


def compute(gpus: int) -> list[dict]:
    """Return memory (without activations) and bytes sent per GPU, by formula, for a large model in bf16 with AdamW."""
    from allinone_ds.balance.combiners.sketch import default_size
    from allinone_ds.planning.memory import Sizes, memory_parts
    from allinone_ds.planning.traffic import moved_parts
    from allinone_ds.run_config.engine_settings import read_engine

    sizes = Sizes(LARGE["backbone"], dict.fromkeys(TASKS, LARGE["head"]), dict.fromkeys(TASKS, 1))
    sketch, rows = default_size(sizes.trained), []
    for stage, settings in ((1, {}), (2, {}), (3, {}), (3, LIMITS)):
        zero = {"stage": stage, "reduce_bucket_size": 50_000_000, **settings}
        engine = read_engine({"zero_optimization": zero, **BF16})
        for way in WAYS:
            if settings and way == "plain":
                continue  # plain accumulation does not keep weights across tasks
            if engine.wraps_bf16 and way in ("sketch", "delayed"):
                continue  # refused: this engine keeps an unsharded gradient of its own
            norm = "exact" if way == "plain" else way
            memory, _ = memory_parts(engine, sizes, gpus, norm, 2, 1, sketch)
            if way == "plain":
                memory["balancer"] = 0
            moved = moved_parts(engine, sizes, gpus, way, sketch)
            name = f"{way}, weights kept over the step" if settings else way
            rows.append({"gpus": gpus, "stage": stage, "way": name, "memory": memory, "moved": moved})
    return rows


def measure_in_namespace(ranks: int) -> list[dict]:
    """Measure on R ranks, in a network namespace that no other process uses."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        launcher += ["--master_addr=127.0.0.1", "-m", __spec__.name, f"--worker={target}"]
        namespace = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ, **worker_environment()}
        command = [*namespace, "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *launcher]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(target.read_text())


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="ranks to measure on (default: 2 4)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1024], help="GPUs to compute for (default: 1024)")
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, measure)
        return
    measured = [row for ranks in args.ranks for row in measure_in_namespace(ranks)]
    if measured:
        print_head("ranks", "ZeRO", "way", "MB sent per rank", "by formula", "MB the balancer keeps", "by formula")
    for row in measured:
        print_row(row["ranks"], row["stage"], row["way"], f"{row['sent'] / 1e6:.1f}",
                  f"{row['sent_by_formula'] / 1e6:.1f}", f"{row['kept'] / 1e6:.2f}",
                  f"{row['kept_by_formula'] / 1e6:.2f}")  # fmt: skip
    computed = [row for gpus in args.gpus for row in compute(gpus)]
    if computed:
        print()
        print_head("GPUs", "ZeRO", "way", "GB of weights", "gradients", "optimizer", "balancer", "buffers", "sum",
                   "GB sent", "of these gradients", "weights", "MB for norms")  # fmt: skip
    for row in computed:
        memory, moved = row["memory"], row["moved"]
        parts = [memory[part] / 1e9 for part in ("weights", "gradients", "optimizer", "balancer", "buffers")]
        cells = [f"{part:.3f}" if 0 < part < 0.1 else f"{part:.2f}" for part in (*parts, sum(parts))]
        weights = moved.get("weights", 0) + moved.get("new weights", 0)
        cells += [f"{part / 1e9:.2f}" for part in (sum(moved.values()), moved["gradients"], weights)]
        print_row(row["gpus"], row["stage"], row["way"], *cells, f"{moved['norms'] / 1e6:.3f}")
    write_record(args.json, measured=measured, on_paper=computed)


if __name__ == "__main__":
    main()
