"""Compares joint blocks at the backbone with `torchjd.autojac.backward`; started by test_joint.py on one rank."""

from __future__ import annotations

import copy
import sys

import deepspeed
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torchjd.autojac import backward, jac_to_grad

from allinone_ds import TaskBalancer, weighting_from_config
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish
from tests.launcher import join_ranks, run_checks

METHODS = {
    "upgrad": "UPGrad", "mgda": "MGDA", "aligned_mtl": "AlignedMTL", "imtl_g": "IMTLG", "dualproj": "DualProj",
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, tasks: int):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({f"task{i}": nn.Linear(6, i % 3 + 1) for i in range(tasks)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {
            task: (head(features) - 0.5).square().mean() * (1 + 2 * int(task[-1])) for task, head in self.heads.items()
        }


def wanted(model: Model, x: Tensor, method: str) -> dict[str, Tensor]:
    """Return the gradients that torchjd gives in float64: aggregated on the backbone, raw on the heads."""
    model = copy.deepcopy(model).double()
    losses = list(model(x.double()).values())
    sum(losses).backward(retain_graph=True)
    heads = {f"heads.{name}": p.grad for name, p in model.heads.named_parameters()}
    shared = list(model.backbone.parameters())
    for p in shared:
        p.grad = None
    backward(losses, inputs=shared)
    jac_to_grad(shared, getattr(torchjd.aggregation, METHODS[method])())
    return {**heads, **{f"backbone.{name}": p.grad for name, p in model.backbone.named_parameters()}}


def check_joint_at_the_backbone_equals_torchjd() -> None:
    for stage in (0, 2):
        for tasks in (3, 5):
            for method in METHODS:
                model, x = Model(tasks), torch.randn(4, 5)
                before = {name: p.detach().double() for name, p in model.named_parameters()}
                expected = wanted(model, x, method)
                optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
                case = Case(f"zero{stage}", stage)
                engine = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]
                balancer = TaskBalancer(engine, tuple(model.heads), "backbone", weighting_from_config({"name": method}))
                with balancer.joint(balancer.tasks):
                    balancer.backward(engine(x))
                balancer.step()
                largest = max(float(gradient.abs().max()) for gradient in expected.values())
                for name, p in engine.module.named_parameters():
                    off = float((before[name] - whole_master(engine, p) - expected[name]).abs().max()) / largest
                    assert off < 1e-5, (stage, tasks, method, name, off)
                finish(balancer)


if __name__ == "__main__":
    join_ranks()
    run_checks({n.removeprefix("check_"): f for n, f in dict(globals()).items() if n.startswith("check_")}, sys.argv[1])
