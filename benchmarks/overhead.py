"""Step time of the balancer against plain DeepSpeed accumulation of the same micro-steps.

    python benchmarks/overhead.py                          # ViT of 22M, 3 tasks, batch 8, 2 CPU ranks, ZeRO 1, 2 and 3
    python benchmarks/overhead.py --stages 2 --modes exact --json benchmarks/results/overhead.json
    sudo python benchmarks/overhead.py --rate 400mbit --size 96 --batch 2    # two hosts joined by a slow link

All engines live in one process and take turns, one step each, so that what else the machine does falls on all. The
figure is the median over rounds of a mode's time / plain time; its spread is the interquartile range. With --rate the
ranks run in two network namespaces joined by a link of that rate (needs root), and bytes sent are read off the link.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from ranks import link_bytes, run_ranks

TASKS = ("det", "seg", "cls")
MODES = {
    "exact": {"norm": "exact"},
    "exact, one trace": {"norm": "exact", "task_traces": False},
    "sketch": {"norm": "sketch"},
    "delayed": {"norm": "delayed"},
}


def build_model(width: int, layers: int, size: int, tasks: tuple[str, ...] = TASKS):
    """A ViT with a linear head a task; the same weights on every call. `forward(task, x, y)` returns the loss."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = Dinov2Config(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                image_size=size,
                patch_size=16,
            )
            self.backbone = Dinov2Model(config)
            self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(width, 100) for task in tasks})

        def forward(self, task, x, y):
            features = self.backbone(x).last_hidden_state.mean(1)
            return torch.nn.functional.cross_entropy(self.heads[task](features).float(), y)

    torch.manual_seed(0)
    return Model()


def build_engine(
    stage: int, accumulation: int, width: int, layers: int, size: int, batch: int = 8, tasks: tuple[str, ...] = TASKS
):
    """The model under ZeRO with AdamW, and its number of parameters."""
    import deepspeed
    import torch

    model = build_model(width, layers, size, tasks)
    groups = [
        {"params": list(model.backbone.parameters())},
        *({"params": list(h.parameters())} for h in model.heads.values()),
    ]
    config = {
        "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, "overlap_comm": False,
                              "stage3_param_persistence_threshold": 10**4},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], parameters


def modes_for(stage: int, wanted: list[str]) -> list[str]:
    """Modes that differ on a ZeRO stage: traces exist under ZeRO-3 only."""
    return [mode for mode in wanted if stage == 3 or "trace" not in mode]


def measure(stage: int, args: argparse.Namespace) -> list[dict]:
    """Let plain and balanced steps take turns; collective. One row a mode."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer

    plain, parameters = build_engine(stage, len(TASKS), args.width, args.layers, args.size, args.batch)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(plain.device)
    y = torch.randint(100, (args.batch,), generator=generator).to(plain.device)

    def plain_step():
        for task in TASKS:
            plain.backward(plain(task, x, y))
            plain.step()

    def balanced_step(balancer):
        for task in TASKS:
            with balancer.task(task):
                balancer.backward(balancer.engine(task, x, y))
        balancer.step()

    steps = {"plain": plain_step}
    balancers = {}
    for mode in modes_for(stage, args.modes):
        engine, _ = build_engine(stage, 1, args.width, args.layers, args.size, args.batch)
        balancers[mode] = TaskBalancer(engine, TASKS, "backbone", TBGC(0.1), **MODES[mode])
        steps[mode] = lambda mode=mode: balanced_step(balancers[mode])

    def take(step) -> tuple[float, int]:
        if plain.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        sent, start = link_bytes(), time.perf_counter()
        step()
        if plain.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, link_bytes() - sent

    for _ in range(2):  # traces are complete after two passes, delayed norms begin with an exact step
        for step in steps.values():
            take(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, int] = {}
    for round_ in range(args.pairs):  # who goes first changes, so that nobody profits from another's caches
        order = list(steps)[round_ % len(steps) :] + list(steps)[: round_ % len(steps)]
        for name in order:
            duration, sent[name] = take(steps[name])
            seconds[name].append(duration)
    rows = []
    for mode, balancer in balancers.items():
        ratios = sorted(b / a for a, b in zip(seconds["plain"], seconds[mode], strict=True))
        quarter = len(ratios) // 4
        rows.append({
            "stage": stage, "mode": mode, "ranks": dist.get_world_size(), "parameters": parameters,
            "batch": args.batch, "size": args.size, "rate": args.rate, "rounds": args.pairs,
            "plain_s": statistics.median(seconds["plain"]), "balanced_s": statistics.median(seconds[mode]),
            "ratio": statistics.median(ratios), "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
            "extra_bytes": balancer.extra_bytes, "plain_sent": sent["plain"], "sent": sent[mode],
        })  # fmt: skip
    for engine in (plain, *(b.engine for b in balancers.values())):
        engine.destroy()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9, help="timed rounds of one step each")
    parser.add_argument("--batch", type=int, default=8, help="images a rank and micro-step")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--rate", help="join two hosts by a link of this rate, for example 400mbit (needs root)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed()
        rows = [row for stage in args.stages for row in measure(stage, args)]
        if dist.get_rank() == 0:
            args.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
        dist.barrier()
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.json or Path(folder) / "found.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        same = [f"--{name}={getattr(args, name)}" for name in ("pairs", "batch", "width", "layers", "size")]
        chosen = ["--stages", *map(str, args.stages), "--modes", *args.modes]
        run_ranks([__file__, "--worker", f"--json={out}", *same, *chosen], args.ranks, args.rate)
        rows = json.loads(out.read_text())["rows"]
    print("| ZeRO | mode | plain s | balanced s | ratio | quartiles | extra MiB a rank | MB sent, plain | MB sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(f"| {row['stage']} | {row['mode']} | {row['plain_s']:.2f} | {row['balanced_s']:.2f} | {row['ratio']:.3f} "
              f"| {low:.3f}-{high:.3f} | {row['extra_bytes'] / 2**20:.1f} | {row['plain_sent'] / 1e6:.0f} "
              f"| {row['sent'] / 1e6:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
