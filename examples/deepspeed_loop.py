"""Balance a DeepSpeed training loop: three tasks on one backbone, with losses that differ by a factor of 3,000.

deepspeed --num_accelerators 2 examples/deepspeed_loop.py    # or: torchrun --nproc_per_node 2 examples/...
"""

import argparse

import deepspeed
import torch

from allinone_ds import TBGC, TaskBalancer

LOSS_FACTORS = {"det": 1.0, "seg": 3000.0, "cls": 30.0}
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 0.0,  # the default of 1.0 would clip the balanced sum a second time
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1000,
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(64, 4) for task in LOSS_FACTORS})

    def forward(self, task, x, y):
        logits = self.heads[task](self.backbone(x))  # (B, 4)
        return LOSS_FACTORS[task] * torch.nn.functional.cross_entropy(logits, y)


def micro_batches(task, step, count, rank):
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    for _ in range(count):
        x = torch.randn(8, 16, generator=generator)  # (B, 16)
        yield x, x[:, list(LOSS_FACTORS).index(task) :: 4].argmax(1)  # (B, 16), (B,)


parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
torch.manual_seed(0)
model = Model()
parts = [model.backbone, *model.heads.values()]  # one parameter group per part: faster, but not required
optimizer = torch.optim.AdamW([{"params": list(part.parameters())} for part in parts], lr=3e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
balancer = TaskBalancer(engine, tasks=LOSS_FACTORS, shared="backbone", weighting=TBGC(max_norm=0.1))
for step in range(args.steps):
    for task in balancer.tasks:
        with balancer.task(task, micro_steps=2):
            for x, y in micro_batches(task, step, 2, engine.global_rank):
                balancer.backward(engine(task, x.to(engine.device), y.to(engine.device)))
    report = balancer.step()
    if engine.global_rank == 0 and step % 20 == 0:
        print(step, {t: f"norm {report.norms[t]:.3g} x {report.scales[t]:.3g}" for t in balancer.tasks}, flush=True)
torch.distributed.destroy_process_group()
