"""Step time of the exact balancer against plain DeepSpeed accumulation of the same micro-steps.

    python benchmarks/overhead.py                          # ViT of 22M, 3 tasks, batch 8, 2 CPU ranks, ZeRO 1, 2 and 3
    python benchmarks/overhead.py --stages 2 --pairs 9 --json benchmarks/results/overhead.json

Both engines live in one process and take turns, one step each, so that what else the machine does falls on both. The
figure is the median over pairs of balanced time / plain time; its spread is the interquartile range.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = ("det", "seg", "cls")


def build_engine(stage: int, accumulation: int, width: int, layers: int, size: int):
    """A ViT with three linear heads under ZeRO, AdamW; the same weights on every call."""
    import deepspeed
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
            self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(width, 100) for task in TASKS})

        def forward(self, task, x, y):
            features = self.backbone(x).last_hidden_state.mean(1)
            return torch.nn.functional.cross_entropy(self.heads[task](features).float(), y)

    torch.manual_seed(0)
    model = Model()
    groups = [
        {"params": list(model.backbone.parameters())},
        *({"params": list(h.parameters())} for h in model.heads.values()),
    ]
    config = {
        "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, "overlap_comm": False,
                              "stage3_param_persistence_threshold": 10**4},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], parameters


def measure(stage: int, args: argparse.Namespace) -> dict:
    """Alternate plain and balanced steps; collective."""
    import torch
    import torch.distributed as dist

    from allinone_ds import TBGC, TaskBalancer

    plain, parameters = build_engine(stage, len(TASKS), args.width, args.layers, args.size)
    ours, _ = build_engine(stage, 1, args.width, args.layers, args.size)
    balancer = TaskBalancer(ours, TASKS, "backbone", TBGC(0.1))
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(ours.device)
    y = torch.randint(100, (args.batch,), generator=generator).to(ours.device)

    def plain_step():
        for task in TASKS:
            plain.backward(plain(task, x, y))
            plain.step()

    def balanced_step():
        for task in TASKS:
            with balancer.task(task):
                balancer.backward(ours(task, x, y))
        balancer.step()

    def seconds(step) -> float:
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        step()
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for step in (plain_step, balanced_step):
        seconds(step)
    pairs = []
    for index in range(args.pairs):  # who goes first changes, so that neither profits from the other's caches
        first, second = (plain_step, balanced_step) if index % 2 == 0 else (balanced_step, plain_step)
        times = {first: seconds(first), second: seconds(second)}
        pairs.append((times[plain_step], times[balanced_step]))
    ratios = sorted(b / a for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "stage": stage, "ranks": dist.get_world_size(), "parameters": parameters, "batch": args.batch,
        "pairs": len(pairs),
        "plain_s": statistics.median(a for a, _ in pairs), "balanced_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios), "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "extra_bytes": balancer.extra_bytes, "device": _device(),
    }  # fmt: skip


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs of steps")
    parser.add_argument("--batch", type=int, default=8, help="images a rank and micro-step")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed()
        rows = [measure(stage, args) for stage in args.stages]
        if dist.get_rank() == 0:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        dist.barrier()
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.json or Path(folder) / "rows.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        same = [f"--{name}={getattr(args, name)}" for name in ("pairs", "batch", "width", "layers", "size")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}",
                   __file__, "--worker", f"--json={out}", *same, "--stages", *map(str, args.stages)]  # fmt: skip
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        rows = json.loads(out.read_text())
    print("| ZeRO | plain s | balanced s | ratio | quartiles | extra MiB a rank |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(f"| {row['stage']} | {row['plain_s']:.2f} | {row['balanced_s']:.2f} | {row['ratio']:.3f} "
              f"| {low:.3f}-{high:.3f} | {row['extra_bytes'] / 2**20:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
