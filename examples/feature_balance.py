"""Balance tasks of one image set without DeepSpeed: one process, DDP or FSDP2; half of the depth labels are missing.

python examples/feature_balance.py
torchrun --nproc_per_node 2 examples/feature_balance.py --wrap ddp     # or --wrap fsdp2
"""

import argparse

import torch
from torch.distributed.fsdp import fully_shard

from allinone_ds import TBGC, FeatureBalance, task_features

CHANNELS = {"edges": 1, "depth": 1, "normals": 3}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.GELU())
        self.heads = torch.nn.ModuleDict({task: torch.nn.Conv2d(32, n, 1) for task, n in CHANNELS.items()})

    def forward(self, x, labels):
        features = self.backbone(x)  # (B, 32, H, W)
        errors = {t: (self.heads[t](task_features(features, t)) - y)[y.isfinite()] for t, y in labels.items()}
        return {t: error.square().mean() for t, error in errors.items()}  # nan without labels


def micro_batch(step, rank):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1000 * step + rank))  # (B, 3, H, W)
    labels = {"edges": 50 * x[:, :1], "depth": x.mean(1, keepdim=True), "normals": x / 10}
    labels["depth"][(step + rank) % 2 :: 2] = torch.nan  # pixels without a label
    return x, labels


parser = argparse.ArgumentParser()
parser.add_argument("--wrap", default="none", help="none, ddp or fsdp2")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
torch.manual_seed(0)
if args.wrap != "none":
    torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank() if args.wrap != "none" else 0
model = torch.nn.parallel.DistributedDataParallel(Model()) if args.wrap == "ddp" else Model()
if args.wrap == "fsdp2":
    for part in (model.backbone, *model.heads.values(), model):
        fully_shard(part)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
balance = FeatureBalance(CHANNELS, TBGC(max_norm=0.1))
for step in range(args.steps):
    optimizer.zero_grad()
    x, labels = micro_batch(step, rank)
    with balance.joint():
        balance.backward(model(x, labels), count={task: int(y.isfinite().sum()) for task, y in labels.items()})
    report = balance.report()
    if not report.skipped:  # names tasks that were not finite
        optimizer.step()
    if step % 20 == 0 and rank == 0:
        print(step, {t: f"loss {report.losses[t]:.3f}, norm {report.norms[t]:.3g}" for t in CHANNELS}, flush=True)
