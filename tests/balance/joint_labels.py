"""Checks of missing labels and of counts, in joint blocks and in blocks of one task; started by ranks_joint.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from allinone_ds import TBGC, Sum, TaskBalancer
from allinone_ds.errors import BalancerError
from allinone_ds.testing.cases import Case
from allinone_ds.zero.params import whole_master
from tests.balance.engines import finish, raises
from tests.balance.joint_model import CASES, LR, TASKS, WEIGHTINGS, batch, compare, make_engine, reference, start_of


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
