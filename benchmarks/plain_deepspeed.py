"""What plain DeepSpeed does with three tasks on one backbone, beside the balancer with `Sum()` (which changes nothing).

    python benchmarks/plain_deepspeed.py

Prints how far the weights are from a float64 reference of the plain sum after 5 SGD steps, as a part of the largest
change of a weight: 0 is right, 1 is as wrong as not training. Three habits are tried on 2 ranks, ZeRO 1, 2 and 3.
accumulation: the tasks' micro-steps are micro-steps of one gradient accumulation. boundary: every task's backward is
at the accumulation boundary, then one step. default clip: accumulation, `gradient_clipping` left out of the config.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import toy
from exactness import STEPS, Case, run_case

SUM = {"name": "sum"}


def plain_run(stage: int, habit: str) -> float:
    """Train without a balancer; returns the distance from the reference. Collective."""
    import deepspeed
    import torch
    import torch.distributed as dist

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
            loss = engine(task, toy.inputs(task, step, 0, dist.get_rank()).float(), True)
            engine.backward(loss, scale_wrt_gas=False)
            if habit != "boundary":
                engine.step()
        if habit == "boundary":
            engine.step()
    wanted = toy.reference_run(SUM, STEPS, dict.fromkeys(toy.TASKS, 1), dist.get_world_size()).params
    start = dict(toy.make_model().named_parameters())
    worst = largest = 0.0
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            worst = max(worst, float((param.detach().double() - wanted[name]).abs().max()))
        largest = max(largest, float((start[name].detach() - wanted[name]).abs().max()))
    engine.destroy()
    return worst / largest


def _worker(out: str) -> None:
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed()
    rows = {}
    for stage in (1, 2, 3):
        rows[stage] = {habit: plain_run(stage, habit) for habit in ("accumulation", "boundary", "default clip")}
        rows[stage]["balancer"] = run_case(Case("ours", stage), SUM, (1, 1, 1))["weights_relative"]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rows))
    dist.barrier()


def main() -> None:
    """Command line."""
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        _worker(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([*command, "--worker", str(out)], check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = json.loads(out.read_text())
    names = list(rows["1"])
    print("| ZeRO | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for stage, row in rows.items():
        print(f"| {stage} | " + " | ".join(f"{row[name]:.1e}" for name in names) + " |")


if __name__ == "__main__":
    main()
