"""What does a balanced ZeRO-3 step send between two nodes, and how much less with copies or kept weights?

    sudo python -m benchmarks.speed.traffic             # the table of docs/scale.md: 2 minutes on 2 cores

A ViT of 3.4M parameters and three tasks on 4 ranks in two network namespaces, two ranks each. Counted are the bytes
that a node sends over the link to the other, and over its loopback device, per step with all headers; beside them are
the formulas of `allinone-ds plan`. "kept" is the share of the model within `stage3_max_live_parameters` and half of
`stage3_max_reuse_distance`; a tenth is about that of 7B parameters within DeepSpeed's defaults. After 5 steps the
weights of all rows of one norm must be equal, bit for bit.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.report import make_parser, print_head, print_row, write_record
from benchmarks.common.vit import TASKS, balanced_step, build_engine, build_model, count_parameters, random_batch

SHAPE = (256, 4, 32)
"""Width, layers and image side: 3M parameters, little to compute."""
STEPS = 5
COUNTED = 3
"""The last steps, of which bytes are counted: the first ones record traces, and delayed norms begin exact."""
WAYS = [
    ("not kept", "exact", 0.0, 1), ("a tenth", "exact", 0.1, 1), ("half", "exact", 0.5, 1), ("all", "exact", 1.0, 1),
    ("a tenth", "delayed", 0.1, 1), ("all", "delayed", 1.0, 1),
    ("a tenth", "exact", 0.1, 2), ("half", "exact", 0.5, 2), ("a tenth", "delayed", 0.1, 2),
]  # fmt: skip
"""(kept over the step, norm, share that is kept, ranks that share a copy). Copies come last: DeepSpeed's later engines
in a process have them too."""


def measure() -> list[dict[str, Any]]:
    """Return one row per way. Call on every rank."""
    import dataclasses

    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer
    from allinone_ds.balance.combiners.sketch import default_size
    from allinone_ds.planning.memory import Sizes
    from allinone_ds.planning.traffic import between_nodes, moved_parts
    from allinone_ds.run_config.engine_settings import read_engine

    world, rows = dist.get_world_size(), []
    x, y = random_batch(2, SHAPE[2], dist.get_rank())
    for kept, norm, share, within in WAYS:
        whole = count_parameters(build_model(*SHAPE))
        zero = {
            "stage3_max_live_parameters": round(share * whole * 1.001),  # rounding must not lose the last layer
            "stage3_max_reuse_distance": 2 * round((share or 0.1) * whole * 1.001),
            "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
            "zero_hpz_partition_size": within,
        }  # fmt: skip
        engine = build_engine(build_model(*SHAPE), 3, zero=zero)
        heads = {task: count_parameters(engine.module.heads[task]) for task in TASKS}
        sizes = Sizes(count_parameters(engine.module.backbone), heads, dict.fromkeys(TASKS, 1))
        balancer = TaskBalancer(engine, TASKS, "backbone", TBGC(0.1), norm=norm)
        before = torch.zeros(2)
        for step in range(STEPS):
            if step == STEPS - COUNTED:
                dist.barrier()
                before = _sent()
                dist.barrier()
            balanced_step(balancer, x, y)
        dist.barrier()
        sent = (_sent() - before) / COUNTED
        dist.all_reduce(sent)  # every rank counts the devices of its node
        plan = dataclasses.replace(read_engine(engine.config), all_reduces=True)  # gloo's reduce-scatter is one
        moved = moved_parts(plan, sizes, world, norm, default_size(sizes.trained))
        rows.append({
            "kept": kept, "norm": norm, "within": within, "between": float(sent[0] / world),
            "inside": float(sent[1] / world), "by_formula": between_nodes(moved, world, world // 2, within),
            "weights_by_formula": moved["weights"], "digest": _digest(engine),
        })  # fmt: skip
        balancer.detach()
        engine.destroy()
    return rows


def _sent() -> Any:
    """Return the bytes that this node has sent to the other, and within itself."""
    import torch

    counters = [Path(f"/sys/class/net/{name}/statistics/tx_bytes") for name in ("eth0", "lo")]
    return torch.tensor([float(counter.read_text()) for counter in counters], dtype=torch.float64)


def _digest(engine: Any) -> str:
    import deepspeed

    digest = hashlib.sha256()
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            digest.update(param.detach().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Run the command line."""
    parser = make_parser(__doc__, worker=True)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, measure)
        return
    rows = measure_on_ranks(__spec__.name, sys.argv[1:], 4, rate="10gbit", environment={"DS_ACCELERATOR": "cpu"})
    first = {row["norm"]: row for row in reversed(rows)}
    print_head("copied within", "kept over the step", "norm", "MB between nodes", "by formula", "of these weights",
               "of the first row", "MB within a node", "weights after 5 steps")  # fmt: skip
    for row in rows:
        equal = row["digest"] == first[row["norm"]]["digest"]
        print_row(f"{row['within']} ranks" if row["within"] > 1 else "", row["kept"], row["norm"],
                  *(f"{row[key] / 1e6:.1f}" for key in ("between", "by_formula", "weights_by_formula")),
                  f"{row['between'] / rows[0]['between']:.2f}", f"{row['inside'] / 1e6:.1f}",
                  "equal" if equal else "DIFFERENT")  # fmt: skip
    write_record(args.json, rows=rows)
    if any(row["digest"] != first[row["norm"]]["digest"] for row in rows):
        raise SystemExit("weights differ")


if __name__ == "__main__":
    main()
