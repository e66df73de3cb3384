"""An accelerate loop of your own, balanced; ZeRO-2 through accelerate's DeepSpeed plugin.

torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState

from allinone_ds import TBGC, TaskBalancer

TASKS = ("coarse", "fine")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        self.heads = torch.nn.ModuleDict({"coarse": torch.nn.Linear(64, 2), "fine": torch.nn.Linear(64, 8)})

    def forward(self, task, x, y):
        loss = torch.nn.functional.cross_entropy(self.heads[task](self.backbone(x)), y)
        return loss * (100.0 if task == "fine" else 1.0)


def dataset(classes):
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(classes))
    return torch.utils.data.TensorDataset(x, x[:, :classes].argmax(1))


def forever(loader):
    while True:
        yield from loader


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
plugin = DeepSpeedPlugin(zero_stage=2)
plugin.deepspeed_config |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}  # else 1.0 clips again
PartialState(cpu=not torch.cuda.is_available())  # without it accelerate takes a CPU machine for a single process
accelerator = Accelerator(deepspeed_plugin=plugin)
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loaders = [torch.utils.data.DataLoader(dataset(classes), batch_size=8, shuffle=True) for classes in (2, 8)]
engine, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
balancer = TaskBalancer(engine, tasks=TASKS, shared="backbone", weighting=TBGC(max_norm=0.1))
batches = dict(zip(TASKS, map(forever, loaders), strict=True))
for step in range(args.steps):
    for task in balancer.tasks:
        with balancer.task(task):
            balancer.backward(engine(task, *next(batches[task])))  # instead of accelerator.backward
    report = balancer.step()  # instead of optimizer.step
    if step % 20 == 0:
        accelerator.print(step, {t: f"loss {report.losses[t]:.3f}, norm {report.norms[t]:.3g}" for t in TASKS})
accelerator.end_training()
