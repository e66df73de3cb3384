"""Balance an accelerate training loop, with ZeRO-2 through the DeepSpeed plugin of accelerate.

torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState

from allinone_ds import TBGC, TaskBalancer

CLASSES = {"coarse": 2, "fine": 8}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(64, classes) for task, classes in CLASSES.items()})

    def forward(self, task, x, y):
        logits = self.heads[task](self.backbone(x))  # (B, K)
        return torch.nn.functional.cross_entropy(logits, y) * (100.0 if task == "fine" else 1.0)


def dataset(classes):
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(classes))  # (512, 16)
    return torch.utils.data.TensorDataset(x, x[:, :classes].argmax(1))  # (512, 16), (512,)


def repeat(loader):
    while True:
        yield from loader


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
plugin = DeepSpeedPlugin(zero_stage=2)
plugin.deepspeed_config |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}  # do not clip twice
PartialState(cpu=not torch.cuda.is_available())  # without this, accelerate runs a single process on a CPU machine
accelerator = Accelerator(deepspeed_plugin=plugin)
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loaders = [torch.utils.data.DataLoader(dataset(k), batch_size=8, shuffle=True) for k in CLASSES.values()]
engine, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
balancer = TaskBalancer(engine, tasks=CLASSES, shared="backbone", weighting=TBGC(max_norm=0.1))
batches = dict(zip(CLASSES, map(repeat, loaders), strict=True))
for step in range(args.steps):
    for task in balancer.tasks:
        with balancer.task(task):
            balancer.backward(engine(task, *next(batches[task])))  # instead of accelerator.backward
    report = balancer.step()  # instead of optimizer.step
    if step % 20 == 0:
        accelerator.print(step, {t: f"loss {report.losses[t]:.3f}, norm {report.norms[t]:.3g}" for t in CLASSES})
accelerator.end_training()
