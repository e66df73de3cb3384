"""Checks of joint blocks and of counted labels on engines; started by test_joint.py.

The reference is one process in float64 that takes the mean over all labels of all ranks and micro-steps.
"""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from allinone_ds import TBGC, GramWeighting, Sum, TaskBalancer, task_features
from allinone_ds.errors import BalancerError, ConfigError
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish, raises
from tests.launcher import join_ranks, run_checks

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
    def __init__(self, marks: bool = True):
        super().__init__()
        self.marks, self.mark_names = marks, dict[str, str]()
        self.backbone = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(7, i + 1) for i, task in enumerate(TASKS)})

    def each(self, task: str, features: Tensor) -> Tensor:
        """Return the loss of each sample, (B,)."""
        return (self.heads[task](features) - 0.5).float().square().mean(-1) * TASKS[task]

    def forward(self, x: Tensor, labels: dict[str, Tensor], none: bool) -> dict[str, Tensor | None]:
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


def start_of(case: Case) -> DoubleModel:
    """Return the model with the weights that an engine starts from, rounded to its type."""
    return make_model(DoubleModel).to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.dtype)).double()


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


def check_joint_at_the_features_equals_one_process() -> None:
    for case in CASES:
        for name in WEIGHTINGS if case.dtype == "fp32" and not case.offload else ("tbgc",):
            compare_features(case, name, 1, "all", False, False)
            compare_features(case, name, 2, "some", True, False)
    for case in CASES[:4]:
        compare_features(case, "tbgc", 2, "missing", True, none=case.stage < 3)


def check_joint_and_task_blocks_mix() -> None:
    """A task of its own beside a joint block gives the step of three tasks of their own."""
    for case in (*CASES[:4], CASES[4]):
        results = []
        for way in ("tasks", "backbone", "features"):
            weighting = Sum() if way == "features" else TBGC(max_norm=0.05)
            engine = make_engine(case)
            balancer = TaskBalancer(engine, tuple(TASKS), "backbone", weighting)
            for step in range(2):
                x, chosen = batch(step, 0, dist.get_rank(), "all")
                if way == "tasks":
                    for task in TASKS:
                        with balancer.task(task):
                            balancer.backward(engine(x.float(), chosen, False)[task])
                else:
                    with balancer.task("b"):
                        balancer.backward(engine(x.float(), {"b": chosen["b"]}, False)["b"])
                    with balancer.joint(("c", "a"), at=way):
                        losses = engine(x.float(), {t: chosen[t] for t in "ac"}, False)
                        balancer.backward(losses)
                report = balancer.step()
            assert report.tasks == tuple(TASKS) and report.applied
            results.append({n: whole_master(engine, p) for n, p in engine.module.named_parameters()})
            finish(balancer)
        assert all(float((results[0][n] - v).abs().max()) < 1e-6 for n, v in results[1].items()), case.name
        plain, _ = reference(case, WEIGHTINGS["sum"][1], "same", 2, 1, "all", False)
        assert all(float((plain[n] - v).abs().max()) < 1e-5 for n, v in results[2].items()), case.name


def check_counts_in_task_blocks_are_means_over_all_labels() -> None:
    for case in CASES[:5]:
        for name in ("tbgc", "gram"):
            weighting, function = WEIGHTINGS[name]
            wanted, norms = reference(case, function, weighting.heads, 2, 3, "some", True)
            engine = make_engine(case)
            balancer = TaskBalancer(engine, tuple(TASKS), "backbone", weighting)
            for step in range(2):
                for task in TASKS:
                    with balancer.task(task, micro_steps=3):
                        for k in range(3):
                            x, chosen = batch(step, k, dist.get_rank(), "some")
                            loss = engine(x.float(), {task: chosen[task]}, False)[task]
                            balancer.backward(loss, count=int(chosen[task].sum()))
                report = balancer.step()
            for task, norm in zip(TASKS, norms, strict=True):
                assert abs(float(report.norms[task]) / norm - 1) < 1e-5, (case.name, name, task)
            for n, p in engine.module.named_parameters():
                assert float((whole_master(engine, p) - wanted[n]).abs().max()) < 1e-6, (case.name, name, n)
            finish(balancer)


def check_how_images_are_divided_does_not_matter_for_pixels_and_objects() -> None:
    """8 images in one batch, 2 ranks x 4, 2 x 2 x 2, 2 x 4 x 1: losses are means over valid pixels, or objects.

    The numbers per image differ by a factor of 9; one image has none.
    """
    numbers = torch.tensor([9, 1, 4, 0, 2, 8, 3, 1])
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(int(n), 5, generator=generator, dtype=torch.float64) for n in numbers]  # things of an image
    model = start_of(Case("zero2", 2))
    wanted = dict(model.named_parameters())
    for task in ("a", "b"):  # Sum: gradients of both tasks add up
        model.each(task, model.backbone(torch.cat(images))).mean().backward()
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = images[rank * 8 // world : (rank + 1) * 8 // world]
    for stage in range(4):
        for micro_steps in (1, 2, 4):
            for way in ("task", "backbone"):
                engine = make_engine(Case(f"zero{stage}", stage))
                balancer = TaskBalancer(engine, tuple(TASKS), "backbone", Sum())
                parts = [torch.cat(mine[k::micro_steps]).float() for k in range(micro_steps)]
                if way == "task":
                    for task in ("a", "b"):
                        with balancer.task(task, micro_steps):
                            for x in parts:
                                chosen = {task: torch.ones(len(x), dtype=torch.bool)}
                                balancer.backward(engine(x, chosen, False)[task], count=len(x))
                else:
                    with balancer.joint(("a", "b"), micro_steps):
                        for x in parts:
                            chosen = {task: torch.ones(len(x), dtype=torch.bool) for task in ("a", "b")}
                            balancer.backward(engine(x, chosen, False), count=dict.fromkeys(("a", "b"), len(x)))
                assert balancer.step(require_all=False).applied
                for name, p in engine.module.named_parameters():
                    gradient = wanted[name].grad
                    value = wanted[name].detach() - (0 if gradient is None else LR * gradient)
                    off = float((whole_master(engine, p) - value).abs().max())
                    assert off < 1e-6, (stage, micro_steps, way, name, off)
                finish(balancer)


def check_an_error_in_a_joint_block_leaves_nothing_of_it() -> None:
    """Also in a block of one task, whose first micro-step has been summed already, or whose gradient was taken."""
    for at in ("backbone", "features"):
        for names in (("a",), ("a", "b", "c")):
            for micro_steps in (1, 2):
                expected, found = (_step_with_joint_block(at, names, micro_steps, fails) for fails in (False, True))
                off = max(float((expected[n] - value).abs().max()) for n, value in found.items())
                assert off < 1e-7, (at, names, micro_steps, off)


def _step_with_joint_block(at: str, names: tuple[str, ...], micro_steps: int, fails: bool) -> dict[str, Tensor]:
    """Return the weights after a step, whose block first ends after its first backward if it `fails`."""
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))

    def run(broken: bool) -> None:
        with balancer.joint(names, micro_steps, at=at):
            for k in range(micro_steps):
                x, chosen = batch(0, k, dist.get_rank(), "all")
                balancer.backward(engine(x.float(), {t: chosen[t] for t in names}, False))
                if broken:
                    raise ZeroDivisionError("planned")

    if fails:
        raises(ZeroDivisionError, "planned", lambda: run(True))
    run(False)
    assert balancer.step(require_all=False).applied
    weights = {n: whole_master(engine, p) for n, p in engine.module.named_parameters()}
    finish(balancer)
    return weights


def check_the_order_of_the_losses_does_not_matter() -> None:
    """Also with labels that are missing, and in a block whose tasks are named in yet another order."""
    for at in ("backbone", "features"):
        results = []
        for order in (("a", "b", "c"), ("c", "a", "b")):
            engine = make_engine(Case("zero2", 2))
            balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))
            with balancer.joint(order if at == "features" else TASKS, 2, at=at):
                for k in range(2):
                    x, chosen = batch(0, k, dist.get_rank(), "missing")
                    losses = engine(x.float(), {t: chosen[t] for t in order}, True)
                    balancer.backward(losses, {t: int(chosen[t].sum()) for t in reversed(order)})
            assert balancer.step().applied
            results.append({n: whole_master(engine, p) for n, p in engine.module.named_parameters()})
            finish(balancer)
        assert all(float((results[0][n] - v).abs().max()) < 1e-7 for n, v in results[1].items()), at


def check_a_task_without_labels_in_the_whole_step_is_absent() -> None:
    """Neither its head nor its weight decay moves, and the others are as without it; counts of 0 and None alike."""
    for stage in range(4):
        for at in ("backbone", "features"):
            results = []
            for way in ("count", "none", "two tasks"):
                if way == "none" and stage == 3 and at == "features":
                    continue  # every rank runs every head
                engine = make_engine(Case(f"zero{stage}", stage))
                balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))
                names = ("a", "c") if way == "two tasks" else tuple(TASKS)
                before = whole_master(engine, engine.module.heads["b"].weight).clone()
                with balancer.joint(names, 2, at=at):
                    for k in range(2):
                        x, chosen = batch(0, k, dist.get_rank(), "all")
                        losses = engine(x.float(), {t: chosen[t] for t in names}, False)
                        count = None
                        if way == "count":
                            count = {"a": 4, "b": 0, "c": 4}
                        elif way == "none":
                            losses["b"] = None
                        balancer.backward(losses, count)
                report = balancer.step(require_all=False)
                assert report.applied and set(report.tasks) == {"a", "c"}, (stage, at, way, report.tasks)
                assert not (whole_master(engine, engine.module.heads["b"].weight) - before).any(), (stage, at, way)
                results.append({n: whole_master(engine, p) for n, p in engine.module.named_parameters()})
                finish(balancer)
            for other in results[1:]:
                off = max(float((results[0][n] - v).abs().max()) for n, v in other.items())
                assert off < 1e-7, (stage, at, off)


def check_misuse_of_joint_blocks() -> None:
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(max_norm=0.05))
    x, chosen = batch(0, 0, dist.get_rank(), "all")

    def block(names, change=lambda losses: losses, **options):
        def run() -> None:
            with balancer.joint(names, **options):
                balancer.backward(change(engine(x.float(), chosen, False)))

        return run

    all_tasks = tuple(TASKS)

    def another_forward(losses):
        return {**losses, "b": engine(x.float(), chosen, False)["b"]}

    def detached(losses):
        return {**losses, "b": engine.module.each("b", torch.ones(4, 7)).mean()}

    for change in (another_forward, detached):
        raises(BalancerError, "task 'b' does not meet those of the other tasks", block(all_tasks, change))
    raises(BalancerError, "unknown task 'x'", block(("a", "x")))
    raises(ConfigError, "did you mean 'features'", block(all_tasks, at="feature"))
    raises(BalancerError, "pass a dict", block(all_tasks, lambda losses: losses["a"]))
    raises(BalancerError, "no loss of task 'b'", block(all_tasks, lambda losses: {"a": losses["a"]}))
    raises(BalancerError, "a loss of 'z'", block(all_tasks, lambda losses: {**losses, "z": None}))
    raises(BalancerError, "without a graph", block(all_tasks, lambda losses: {**losses, "a": torch.ones(())}))
    raises(BalancerError, "after 1 of 2 micro-steps", block(all_tasks, micro_steps=2))
    raises(BalancerError, "no features are marked", _with_marks(engine, block(all_tasks, at="features"), None))
    swapped = {"a": "b", "b": "a", "c": "c"}
    raises(BalancerError, "marked for task 'b'", _with_marks(engine, block(all_tasks, at="features"), swapped))
    twice = {"a": "a", "b": "a", "c": "c"}
    raises(BalancerError, "a second time", _with_marks(engine, block(all_tasks, at="features"), twice))
    other = {"a": "a", "b": "b", "c": "x"}
    raises(BalancerError, "unknown task 'x'", _with_marks(engine, block(all_tasks, at="features"), other))

    raises(BalancerError, "does not reach the features", block(all_tasks, detached, at="features"))
    with_counts = (
        ("pass a dict", 3),
        ("unknown task 'z'", {"a": 1, "b": 1, "c": 1, "z": 1}),
        ("no count of task 'b'", {"a": 1, "c": 1}),
        ("count of task 'b' = -1", {"a": 1, "b": -1, "c": 1}),
        ("count of task 'b' = nan", {"a": 1, "b": float("nan"), "c": 1}),
        ("count of task 'b' = 'x'", {"a": 1, "b": "x", "c": 1}),
        ("an integer of 0 or more", {"a": 1, "b": 1.5, "c": 1}),
    )
    for text, count in with_counts:
        for at in ("backbone", "features"):
            raises(BalancerError, text, _counted(balancer, lambda: engine(x.float(), chosen, False), count, at))
    missing = {"a": 1, "b": 2, "c": 1}

    def without_b():
        return {**engine(x.float(), chosen, False), "b": None}

    raises(BalancerError, "count of task 'b' = 2, and its loss is None", _counted(balancer, without_b, missing))
    raises(BalancerError, "an integer of 0 or more", _count_of_a_task(balancer, engine, x, chosen, {"a": 1}))
    raises(BalancerError, "an integer of 0 or more", _count_of_a_task(balancer, engine, x, chosen, 2.5))
    if dist.get_world_size() > 1:
        mine = ("a", "b") if dist.get_rank() else ("b", "a")
        raises(BalancerError, "ranks disagree", block(mine, lambda losses: {t: losses[t] for t in mine}))
        raises(BalancerError, "ranks disagree", block(all_tasks, micro_steps=1 + dist.get_rank()))
        fails = block(all_tasks, (lambda losses: losses["a"]) if dist.get_rank() else (lambda losses: losses))
        raises(BalancerError, "pass a dict" if dist.get_rank() else "rank 1: left task", fails)
    block(all_tasks, lambda losses: dict(reversed(losses.items())))()
    raises(BalancerError, "second time", block(("a",)))
    assert balancer.step().applied, "usable after every error"
    finish(balancer)
    engine = make_engine(Case("zero2", 2))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", TBGC(), norm="sketch")
    raises(ConfigError, "norm='exact'", block(all_tasks))
    finish(balancer)


def _with_marks(engine, call, names: dict[str, str] | None):
    """Return the call with features marked for the tasks `names`; None: not marked."""

    def run() -> None:
        engine.module.marks = names is not None
        engine.module.mark_names = names or {}
        try:
            call()
        finally:
            engine.module.marks, engine.module.mark_names = True, {}

    return run


def _counted(balancer, losses, count, at: str = "backbone"):
    def run() -> None:
        with balancer.joint(TASKS, at=at):
            balancer.backward(losses(), count=count)

    return run


def _count_of_a_task(balancer, engine, x, chosen, count):
    def run() -> None:
        with balancer.task("a"):
            balancer.backward(engine(x.float(), {"a": chosen["a"]}, False)["a"], count=count)

    return run


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


def check_joint_at_the_backbone_equals_one_process() -> None:
    for case in CASES:
        for name in ("tbgc", "gram") if case.dtype == "fp32" else ("tbgc",):
            compare(case, name, 1, "all", False, False)
            compare(case, name, 2, "some", True, False)


def check_partial_labels_have_the_right_denominator() -> None:
    for case in CASES[:4] + CASES[9:10]:
        for micro_steps in (1, 2):
            labels = "missing" if micro_steps == 2 else "some"
            compare(case, "tbgc", micro_steps, labels, True, none=case.stage < 3)
    for case in CASES[:3]:
        compare(case, "tbgc", 2, "missing", False, none=True)
        compare(case, "tbgc", 2, "missing", True, none=True, check_ranks=False)


def check_a_missing_loss_on_zero3_is_an_error_of_all_ranks() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(Case("zero3", 3))
    balancer = TaskBalancer(engine, tuple(TASKS), "backbone", Sum())
    x, chosen = batch(0, 1, dist.get_rank(), "missing")

    def run() -> None:
        with balancer.joint(TASKS):
            losses = engine(x.float(), chosen, False)
            balancer.backward({t: None if not bool(chosen[t].any()) else loss for t, loss in losses.items()})

    raises(BalancerError, "'b' has no loss on rank(s) 1", run)
    finish(balancer)


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    join_ranks()
    wanted = sys.argv[2:]
    checks = {n.removeprefix("check_"): f for n, f in dict(globals()).items() if n.startswith("check_")}
    run_checks({n: c for n, c in checks.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
