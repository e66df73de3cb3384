"""A model with three tasks on one forward, trained with joint blocks, and in float64 on one process.

Imported on ranks by ranks_joint.py and its checks.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allinone_ds import TBGC, GramWeighting, Sum, TaskBalancer, task_features
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish

TASKS = {"a": 1.0, "b": 9.0, "c": 0.1}
LR = 0.02
CASES = [
    *(Case(f"zero{stage}", stage) for stage in range(4)),
    *(Case(f"zero{stage} offload", stage, offload=True) for stage in (2, 3)),
    *(Case(f"zero{stage} bf16", stage, "bf16") for stage in (0, 2, 3)),
    Case("zero1 bf16 fp32", 1, "bf16", "fp32"),
    *(Case(f"zero{stage} fp16", stage, "fp16") for stage in (0, 1, 3)),
    Case("zero3 not retained", 3, zero={"stage3_max_live_parameters": 10}),  # as a model of 1e9 parameters is not
]


class Model(nn.Module):
    """Three heads on the features of one backbone.

    Attributes:
        marks: whether it calls `task_features`.
        mark_names: task -> name that its features are marked with, where that is not its own.
        checkpointed: "" or what runs under activation checkpointing: "backbone" or "model".
        reentrant: kind of activation checkpointing.
    """

    def __init__(self, marks: bool = True):
        super().__init__()
        self.marks, self.mark_names = marks, dict[str, str]()
        self.checkpointed, self.reentrant = "", False
        self.backbone = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(7, i + 1) for i, task in enumerate(TASKS)})

    def each(self, task: str, features: Tensor) -> Tensor:
        """Return the loss of each sample, (B,)."""
        return (self.heads[task](features) - 0.5).float().square().mean(-1) * TASKS[task]

    def forward(self, x: Tensor, labels: dict[str, Tensor], none: bool) -> dict[str, Tensor | None]:
        if self.checkpointed != "model":
            return self.losses(x, labels, none)
        x = x.requires_grad_()  # without it reentrant checkpointing has no graph
        values = checkpoint(lambda x: tuple(self.losses(x, labels, none).values()), x, use_reentrant=self.reentrant)
        return dict(zip(labels, values, strict=True))

    def losses(self, x: Tensor, labels: dict[str, Tensor], none: bool) -> dict[str, Tensor | None]:
        if self.checkpointed == "backbone":
            features = checkpoint(self.backbone, x.requires_grad_(), use_reentrant=self.reentrant)
        else:
            features = self.backbone(x)
        losses: dict[str, Tensor | None] = {}
        for task, chosen in labels.items():
            if none and not bool(chosen.any()):
                losses[task] = None
                continue
            name = self.mark_names.get(task, task)
            each = self.each(task, task_features(features, name) if self.marks else features)
            losses[task] = each[chosen].mean()
        return losses


class DoubleModel(Model):
    def each(self, task: str, features: Tensor) -> Tensor:
        return (self.heads[task](features) - 0.5).square().mean(-1) * TASKS[task]


def make_model(kind=Model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


def batch(step: int, k: int, rank: int, labels: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (4, 5) inputs and task -> which samples have a label.

    Args:
        step, k, rank: of the micro-batch.
        labels: "all"; "some": unequal numbers, at least one per rank; "missing": rank 1 has none of "b", and no rank
            has one of "c" in the first micro-step.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * k + rank)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    numbers = {"a": 4, "b": 4, "c": 4}
    if labels != "all":
        numbers = {"a": 1 + (rank + k) % 4, "b": 4 - rank % 3, "c": 1 + 2 * (k % 2)}
    if labels == "missing":
        numbers["b"] = 0 if rank == 1 else numbers["b"]
        numbers["c"] = 0 if k == 0 else numbers["c"]
    return x, {task: torch.arange(4) < number for task, number in numbers.items()}


def start_of(case: Case) -> DoubleModel:
    """Return the model with the weights that an engine starts from, rounded to its type."""
    return make_model(DoubleModel).to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.dtype)).double()


def gradients(model: Model, task: str, step: int, micro_steps: int, labels: str, counted: bool) -> dict[str, Tensor]:
    losses = []
    for k in range(micro_steps):
        for rank in range(dist.get_world_size()):
            x, chosen = batch(step, k, rank, labels)
            each = model.each(task, model.backbone(x))[chosen[task]]
            losses.append(each if counted else each.mean().reshape(1) if len(each) else each)
    loss = torch.cat(losses).mean()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def reference(case: Case, function, heads: str, steps: int, micro_steps: int, labels: str, counted: bool):
    """Return the trained weights and the norms of the last step, balanced at the backbone."""
    model = start_of(case)
    norms: list[float] = []
    for step in range(steps):
        found = [gradients(model, task, step, micro_steps, labels, counted) for task in TASKS]
        rows = [torch.cat([v.flatten() for n, v in g.items() if n.startswith("backbone")]) for g in found]
        jacobian = torch.stack(rows)
        factors, norms = function(jacobian @ jacobian.T), jacobian.norm(dim=1).tolist()
        with torch.no_grad():
            for factor, gradient in zip(factors, found, strict=True):
                for name, value in gradient.items():
                    raw = heads == "none" and not name.startswith("backbone")
                    model.get_parameter(name).sub_(LR * value * (1.0 if raw else factor))
    return {n: p.detach() for n, p in model.named_parameters()}, norms


def clip(gram: Tensor) -> Tensor:
    return (0.05 / (gram.diagonal().sqrt() + 1e-6)).clamp(max=1.0)


def inverse(gram: Tensor) -> Tensor:
    return 0.1 * gram.sum(1).abs().rsqrt()


WEIGHTINGS = {
    "tbgc": (TBGC(max_norm=0.05), clip),
    "sum": (Sum(), lambda gram: torch.ones(len(gram), dtype=gram.dtype)),
    "gram": (GramWeighting(inverse), inverse),
}


def make_engine(case: Case, marks: bool = True):
    model = make_model()
    model.marks = marks
    optimizer = torch.optim.SGD(
        [{"params": list(model.backbone.parameters())}, {"params": list(model.heads.parameters())}], lr=LR
    )
    return deepspeed.initialize(model=model.float(), optimizer=optimizer, config=case.config())[0]


def features_reference(case: Case, function, steps: int, micro_steps: int, labels: str, counted: bool):
    """Return the trained weights and the norms of the last micro-step, balanced at the features in every micro-step."""
    model = start_of(case)
    world, norms = dist.get_world_size(), {}
    for step in range(steps):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for k in range(micro_steps):
            batches = [batch(step, k, rank, labels) for rank in range(world)]
            features = torch.cat([model.backbone(x) for x, _ in batches])
            read = features.detach().requires_grad_()
            rows, losses = [], []
            for task in TASKS:
                each = model.each(task, read).split(4)
                parts = [e[chosen[task]] for e, (_, chosen) in zip(each, batches, strict=True)]
                if not any(len(part) for part in parts):
                    continue
                mean = torch.cat(parts).mean() if counted else torch.stack([p.mean() for p in parts if len(p)]).mean()
                rows.append(torch.autograd.grad(mean, read, retain_graph=True)[0].flatten())
                losses.append(mean)
                norms[task] = float(rows[-1].norm())
            jacobian = torch.stack(rows)
            factors = function(jacobian @ jacobian.T)
            heads = dict(model.heads.named_parameters(prefix="heads"))
            found = torch.autograd.grad(sum(losses), list(heads.values()), allow_unused=True)
            back = dict(model.backbone.named_parameters(prefix="backbone"))
            sums = torch.autograd.grad(features, list(back.values()), (factors @ jacobian).view_as(features))
            for name, value in zip((*heads, *back), (*found, *sums), strict=True):
                total[name] += 0 if value is None else value / micro_steps
        with torch.no_grad():
            for name, value in total.items():
                model.get_parameter(name).sub_(LR * value)
    return {n: p.detach() for n, p in model.named_parameters()}, norms


def train(
    case: Case, weighting, at: str, steps: int, micro_steps: int, labels: str, counted: bool, none: bool, **options
):
    """Return weights and the last report of training with joint blocks."""
    engine = make_engine(case)
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", weighting, **options)
    dtype = next(engine.module.parameters()).dtype
    for step in range(steps):
        with balancer.joint(TASKS, micro_steps, at=at):
            for k in range(micro_steps):
                x, chosen = batch(step, k, dist.get_rank(), labels)
                losses = engine(x.to(dtype), chosen, none)
                count = {task: int(which.sum()) for task, which in chosen.items()} if counted else None
                balancer.backward(losses, count)
        report = balancer.step()
    weights = {n: whole_master(engine, p) for n, p in engine.module.named_parameters()}
    finish(balancer)
    return weights, report


def compare(case: Case, name: str, micro_steps: int, labels: str, counted: bool, none: bool, **options) -> None:
    weighting, function = WEIGHTINGS[name]
    wanted, norms = reference(case, function, weighting.heads, 3, micro_steps, labels, counted)
    weights, report = train(case, weighting, "backbone", 3, micro_steps, labels, counted, none, **options)
    start = dict(start_of(case).named_parameters())
    largest = max(float((value - start[n]).abs().max()) for n, value in wanted.items())
    limit = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}[case.dtype]
    where = (case.name, name, micro_steps, labels, counted, none)
    for task, norm in zip(TASKS, norms, strict=True):
        assert abs(float(report.norms[task]) / norm - 1) < limit, (where, task, float(report.norms[task]), norm)
    for n, value in wanted.items():
        off = float((weights[n] - value).abs().max()) / largest
        assert off < limit, (where, n, off)


def compare_features(case: Case, name: str, micro_steps: int, labels: str, counted: bool, none: bool) -> None:
    weighting, function = WEIGHTINGS[name]
    wanted, norms = features_reference(case, function, 3, micro_steps, labels, counted)
    weights, report = train(case, weighting, "features", 3, micro_steps, labels, counted, none)
    start = dict(start_of(case).named_parameters())
    largest = max(float((value - start[n]).abs().max()) for n, value in wanted.items())
    limit = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}[case.dtype]
    where = (case.name, name, micro_steps, labels, counted, none)
    if micro_steps == 1:
        for task, norm in norms.items():
            assert abs(float(report.norms[task]) / norm - 1) < limit, (where, task, float(report.norms[task]), norm)
    for n, value in wanted.items():
        off = float((weights[n] - value).abs().max()) / largest
        assert off < limit, (where, n, off)
