"""Tasks on different ranks against one after another: the same samples a step, on 4 CPU ranks, costs 4 : 2 : 1.

    python benchmarks/task_parallel.py --json benchmarks/results/task_parallel.json
    sudo python benchmarks/task_parallel.py --rate 400mbit       # two hosts of two ranks joined by a link of that rate

A ViT reads images of three sizes, so that detection costs about 4 times and segmentation 2 times what classification
does. Every rank of the sequential modes runs one micro-batch of every task; apart, a task's ranks deal out the same
micro-batches among them, as `plan_groups` divides the ranks by the times measured at the start. All modes live in one
process and take turns. Three kinds of cost:

    computed   the ViT's own forwards and backwards. Ranks that share cores hide what waiting costs.
    slept      a tiny model, and every micro-batch sleeps what its task costs: ranks do not share cores. Simulated.
    slept, uneven   the same, where a micro-batch costs from 0.5 to 1.5 times as much, as with images of many sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from ranks import link_bytes, run_ranks

SIZES = {"det": 128, "seg": 96, "cls": 64}  # pixels: 64, 36 and 16 patches of 16 x 16
SECONDS = {"det": 0.8, "seg": 0.4, "cls": 0.2}  # slept by one micro-batch
BATCH = 4
COSTS = ("computed", "slept", "slept, uneven")
MODES = {
    "one after another, exact": {"norm": "exact"},
    "one after another, sketch": {"norm": "sketch"},
    "one after another, delayed": {"norm": "delayed"},
    "apart, exact": {"norm": "exact", "parallel": "tasks"},
    "apart, sketch": {"norm": "sketch", "parallel": "tasks"},
}


def build_engine(stage: int, width: int, layers: int):
    """A ViT with a linear head a task under ZeRO and AdamW; the same weights on every call."""
    import deepspeed
    import torch
    from transformers import Dinov2Config, Dinov2Model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
                                  image_size=max(SIZES.values()), patch_size=16)  # fmt: skip
            self.backbone = Dinov2Model(config)
            self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(width, 100) for task in SIZES})

        def forward(self, task, x, y):
            features = self.backbone(x).last_hidden_state.mean(1)
            return torch.nn.functional.cross_entropy(self.heads[task](features), y)

    torch.manual_seed(0)
    model = Model()
    groups = [{"params": list(part.parameters())} for part in (model.backbone, *model.heads.values())]
    config = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 0.0, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, "overlap_comm": False},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def micro_batch(task: str, step: int, rank: int):
    """Images (BATCH, 3, H, W), labels (BATCH,), and how many times the task's usual cost an uneven one has."""
    import torch

    generator = torch.Generator().manual_seed((step * 31 + list(SIZES).index(task)) * 37 + rank)
    x = torch.randn(BATCH, 3, SIZES[task], SIZES[task], generator=generator)
    y = torch.randint(100, (BATCH,), generator=generator)
    return x, y, 0.5 + float(torch.rand((), generator=generator))


def measure(stage: int, cost: str, args: argparse.Namespace) -> dict:
    """Let all modes take turns; collective."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer, plan_groups

    width, layers = (args.width, args.layers) if cost == "computed" else (64, 2)
    busy = [0.0]  # seconds that this rank computed or slept in a step

    def loss_of(balancer, task: str, step: int, rank: int):
        x, y, factor = micro_batch(task, step, rank)
        if cost != "computed":
            time.sleep(SECONDS[task] * (factor if "uneven" in cost else 1.0))
            x = x[..., :32, :32]
        return balancer.engine(task, x, y)

    balancers = {
        name: TaskBalancer(build_engine(stage, width, layers), SIZES, "backbone", TBGC(0.1), **options)
        for name, options in MODES.items()
    }
    apart = balancers["apart, exact"]
    seconds = apart.measure(lambda task: loss_of(apart, task, 0, dist.get_rank()))
    plan = plan_groups(seconds, dist.get_world_size())
    for balancer in balancers.values():
        if balancer.parallel == "tasks":
            balancer.regroup(plan.groups)

    def take(balancer, step: int) -> list[float]:
        dist.barrier()
        sent, start = link_bytes(), time.perf_counter()
        busy[0] = 0.0
        for task in balancer.tasks:
            mine = balancer.share(task)
            with balancer.task(task, len(mine)):
                for _, rank in mine:
                    begin = time.perf_counter()
                    loss = loss_of(balancer, task, step, rank)
                    balancer.backward(loss)
                    busy[0] += time.perf_counter() - begin
        balancer.step()
        return [time.perf_counter() - start, busy[0], link_bytes() - sent]

    rows: dict[str, list[list[float]]] = {name: [] for name in balancers}
    for step in range(2 + args.rounds):
        order = list(balancers)[step % len(balancers) :] + list(balancers)[: step % len(balancers)]
        for name in order:
            row = take(balancers[name], step)
            if step >= 2:  # delayed norms begin with an exact step
                rows[name].append(row)
    found = torch.tensor([rows[name] for name in balancers], dtype=torch.float64)  # (modes, rounds, 3)
    every = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(every, found)
    table = torch.stack(every)  # (ranks, modes, rounds, 3)
    slowest = table[..., 0].amax(0)  # (modes, rounds)
    base = slowest[0]
    weights = [p.detach().double() for p in balancers["one after another, exact"].engine.module.parameters()]
    results = {}
    for number, (name, balancer) in enumerate(balancers.items()):
        ratios = sorted((slowest[number] / base).tolist())
        quarter = len(ratios) // 4
        others = [p.detach().double() for p in balancer.engine.module.parameters()]
        results[name] = {
            "seconds": statistics.median(slowest[number].tolist()), "every_step": slowest[number].tolist(),
            "ratio": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
            "idle": float(1 - table[:, number, :, 1].mean(0).div(slowest[number]).mean()),
            "sent": int(table[0, number, -1, 2]), "extra_bytes": balancer.extra_bytes,
            "off": max(float((a - b).abs().max()) for a, b in zip(weights, others, strict=True)),
        }  # fmt: skip
        balancer.engine.destroy()
    return {
        "stage": stage, "cost": cost, "ranks": dist.get_world_size(), "rate": args.rate, "rounds": args.rounds,
        "micro_batch_seconds": seconds, "plan": str(plan), "modes": results,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[2], choices=(1, 2))
    parser.add_argument("--costs", nargs="*", default=list(COSTS), choices=COSTS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every mode")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rate", help="join two hosts by a link of this rate, for example 400mbit (needs root)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed()
        rows = [measure(stage, cost, args) for stage in args.stages for cost in args.costs]
        if dist.get_rank() == 0:
            args.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
        dist.barrier()
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        out = args.json or Path(folder) / "found.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        same = [f"--rounds={args.rounds}", f"--width={args.width}", f"--layers={args.layers}"]
        chosen = ["--stages", *map(str, args.stages), "--costs", *args.costs]
        run_ranks([__file__, "--worker", f"--json={out}", *same, *chosen], args.ranks, args.rate)
        rows = json.loads(out.read_text())["rows"]
    print("| ZeRO | cost | mode | step s | ratio | quartiles | idle | MB sent | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        for mode, found in row["modes"].items():
            low, high = found["quartiles"]
            print(f"| {row['stage']} | {row['cost']} | {mode} | {found['seconds']:.2f} | {found['ratio']:.3f} "
                  f"| {low:.3f}-{high:.3f} | {found['idle']:.0%} | {found['sent'] / 1e6:.0f} "
                  f"| {found['off']:.0e} |")  # fmt: skip
        print(f"\n{row['plan']}\n")


if __name__ == "__main__":
    main()
