"""What does plain DeepSpeed compute for three tasks on one backbone, beside the balancer with `Sum()`?

    python -m benchmarks.correctness.plain_deepspeed            # 1 minute on 2 cores

Prints the distance of the weights from a float64 reference of the plain sum after 5 SGD steps on 2 ranks, relative to
the largest change of a weight: 0 is exact, 1 is as wrong as not training. Columns:

    accumulation   the tasks' micro-steps are the micro-steps of one gradient accumulation
    boundary       every task's backward runs at the accumulation boundary, then one optimizer step
    default clip   as accumulation, with `gradient_clipping` left out of the config
    balancer       `TaskBalancer` with `Sum()`
"""

from __future__ import annotations

import sys

from benchmarks.common.launch import measure_on_ranks, serve
from benchmarks.common.report import make_parser, print_head, print_row, write_record

SUM = {"name": "sum"}
HABITS = ("accumulation", "boundary", "default clip")


def run_plain(stage: int, habit: str) -> float:
    """Train without a balancer; return the distance from the reference. Call on every rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from allinone_ds.testing import toy
    from allinone_ds.testing.cases import STEPS, Case
    from allinone_ds.testing.reference import reference_run
    from allinone_ds.zero.params import whole_master

    config = Case("plain", stage).config()
    if habit == "default clip":
        del config["gradient_clipping"]
    if habit != "boundary":
        config["gradient_accumulation_steps"] = len(toy.TASKS)
    model = toy.make_model().float()
    optimizer = torch.optim.SGD(toy.param_groups(model), lr=toy.rate(SUM))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for step in range(STEPS):
        for task in toy.TASKS:
            if habit == "boundary":
                engine.set_gradient_accumulation_boundary(True)
            loss = engine(task, toy.inputs(task, step, 0, dist.get_rank()).float().to(engine.device), True)
            engine.backward(loss, scale_wrt_gas=False)
            if habit != "boundary":
                engine.step()
        if habit == "boundary":
            engine.step()
    reference = reference_run(SUM, STEPS, dict.fromkeys(toy.TASKS, 1), dist.get_world_size())
    worst = largest = 0.0
    for name, start in toy.make_model().named_parameters():
        if start.requires_grad:
            target = reference.params[name]
            trained = whole_master(engine, engine.module.get_parameter(name))
            worst = max(worst, float((trained - target).abs().max()))
            largest = max(largest, float((start.detach() - target).abs().max()))
    engine.destroy()
    return worst / largest


def measure() -> list[dict]:
    """Return one row per ZeRO stage. Call on every rank."""
    from allinone_ds.testing.cases import Case
    from benchmarks.correctness.balanced_case import run_case

    rows = []
    for stage in (1, 2, 3):
        distances = {habit: run_plain(stage, habit) for habit in HABITS}
        distances["balancer"] = run_case(Case("balancer", stage), SUM, (1, 1, 1))["weights_relative"]
        rows.append({"stage": stage, **distances})
    return rows


def main() -> None:
    """Run the command line."""
    args = make_parser(__doc__, worker=True).parse_args()
    if args.worker:
        serve(args.worker, measure)
        return
    rows = measure_on_ranks(__spec__.name, sys.argv[1:], 2, quiet=True)
    print_head("ZeRO", *HABITS, "balancer")
    for row in rows:
        print_row(row["stage"], *(f"{row[name]:.1e}" for name in (*HABITS, "balancer")))
    write_record(args.json, rows=rows)


if __name__ == "__main__":
    main()
