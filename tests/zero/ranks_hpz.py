"""Copies of weights within groups of two of 4 ranks (`zero_hpz_partition_size`); started by test_hpz.py.

4 ranks write checkpoints, which 2 ranks, one group, read afterwards.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from allinone_ds.testing.cases import MICRO_STEPS, WEIGHTINGS
from allinone_ds.training.ema import ShardEMA, ema_file
from allinone_ds.zero.checkpoint.consolidate import consolidate, trained_weights
from allinone_ds.zero.checkpoint.reshard import load_resharded
from allinone_ds.zero.checkpoint.write import own_checkpoint_files, save_engine
from allinone_ds.zero.engines.choose import open_engine
from tests.balance.engines import (
    CASES,
    finish,
    inputs,
    largest_change,
    make_balancer,
    make_engine,
    run_case,
    run_task,
    toy,
    weights,
    whole_master,
)
from tests.launcher import run_checks

FOLDER = Path(sys.argv[2])
HPZ = [name for name in CASES if " hpz" in name]
LIVE = {"stage3_max_live_parameters": 500}  # the last layer of the backbone and some of the one before
ZERO = CASES["zero3 fp32 hpz"].config()["zero_optimization"]


def check_exact(case: str, weighting: str, micro_steps: tuple[int, ...]) -> None:
    """Norms and weights are those of the float64 reference."""
    found = run_case(CASES[case], WEIGHTINGS[weighting], micro_steps)
    assert found["norms"] < (1e-2 if "bf16" in case else 1e-6), found
    assert found["weights"] < 1e-6 or (found["weights_relative"] < 1e-2 and "bf16" in case), found


def train(engine, norm: str = "exact", steps: range = range(5), left_out: int | None = None, **options):
    """Take steps with one, two and one micro-steps, in one of them without the last task; return the balancer."""
    balancer = make_balancer(engine, norm=norm, **options)
    for step in steps:
        for task in toy.TASKS[: -1 if step == left_out else None]:
            run_task(balancer, task, step, 2 if task == "seg" else 1)
        balancer.step(require_all=False)
    return balancer


def check_same_as_without(folder: Path) -> None:
    """Sketched, delayed and exact norms, with absent tasks and some weights kept: bit for bit those without copies."""
    for norm in ("exact", "sketch", "delayed"):
        for kept in (False, True):
            engine = make_engine("zero3 fp32 hpz", "adam", zero_optimization={**ZERO, **(LIVE if kept else {})})
            balancer = train(engine, norm, left_out=2)
            assert largest_change(weights(engine), torch.load(folder / f"{norm}.pt")) == 0.0, (norm, kept)
            finish(balancer)


def write_without(folder: Path) -> None:
    """What `check_same_as_without` compares with; before the first engine that copies weights."""
    for norm in ("exact", "sketch", "delayed"):
        engine = make_engine("zero3 fp32", "adam")
        balancer = train(engine, norm, left_out=2)
        if dist.get_rank() == 0:
            torch.save(weights(engine), folder / f"{norm}.pt")
        else:
            weights(engine)
        finish(balancer)
    dist.barrier()


def losses(engine) -> list[float]:
    with torch.no_grad():
        return [float(engine(task, inputs(engine, task, 9, 0), True)) for task in toy.TASKS]


def check_gathered_within_groups() -> None:
    """Among all ranks, weights are gathered once per step; what comes after is gathered within the groups."""
    zero = {**ZERO, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 10}
    engine = make_engine("zero3 fp32 hpz", zero_optimization=zero)
    balancer = train(engine, steps=range(2))
    gathered = {True: 0, False: 0}
    for param in engine.module.parameters():

        def counting(params, *args, gather=param.all_gather_coalesced, **kwargs):
            params = list(params)
            for one in params:
                gathered[one.ds_secondary_tensor is not None] += one.ds_numel
            return gather(params, *args, **kwargs)

        param.all_gather_coalesced = counting
    for task in toy.TASKS:
        run_task(balancer, task, 2, 2)
    balancer.step()
    trained = sum(p.ds_numel for p in engine.module.parameters() if p.requires_grad)
    assert gathered[False] <= trained, gathered
    assert gathered[True] > 5 * trained, gathered
    finish(balancer)


def save(engine, ema: ShardEMA, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    assert save_engine(engine, folder) == []
    torch.save(ema.state_dict(), ema_file(folder, dist.get_rank(), dist.get_world_size()))
    dist.barrier()


def check_consolidated(engine, folder: Path) -> None:
    """The weights that an export reads from the shards are those of the engine: masters, frozen ones and buffers."""
    [shards] = folder.glob("global_step*")
    whole, as_trained = consolidate(shards), trained_weights(shards, next(engine.module.parameters()).dtype)
    now = weights(engine)
    assert whole.keys() == as_trained.keys() == engine.module.state_dict().keys()
    for name, param in engine.module.named_parameters():
        assert torch.equal(as_trained[name].double(), now[name]), name
        if param.requires_grad:
            assert torch.equal(whole[name].double(), whole_master(engine, param)), name


def write_without_copies(folder: Path) -> None:
    """The checkpoint of `check_resume`, by an engine without copies."""
    engine = make_engine("zero3 fp32", "adam")
    with torch.no_grad():
        for param in engine.module.backbone.frozen.parameters():
            param.ds_tensor.mul_(3.0)
    balancer, ema = train(engine, steps=range(2)), ShardEMA(engine, 0.5)
    ema.update()
    save(engine, ema, folder)
    finish(balancer)


def read(case: str, source: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint of 4 ranks on these; return its weights, moments and averages, and those after two steps."""
    engine = make_engine(case, "adam")
    balancer, ema = make_balancer(engine), ShardEMA(engine, 0.5)
    losses(engine)
    load_resharded(engine, next(source.glob("global_step*")))
    assert ema.load(source)
    adapter = open_engine(engine)
    found = {f"loaded {name}": value for name, value in weights(engine).items()}
    for f in adapter.fragments():  # what lies between them is padding
        master = adapter.masters()[f.group]
        state = engine.optimizer.optimizer.state[master]
        of_group = {"master": master, "average": ema.shards[f.group], **{key: state[key] for key in MOMENTS}}
        for key, value in of_group.items():
            found[f"{key} {f.name}"] = value.detach().view(-1)[f.start : f.start + f.length].clone()
    balancer.detach()
    balancer = train(engine, steps=range(2, 4))
    ema.update()
    found |= {f"trained {name}": value for name, value in weights(engine).items()}
    with ema.applied():
        found |= {f"averaged {name}": value for name, value in weights(engine).items()}
    finish(balancer)
    return found


MOMENTS = ("exp_avg", "exp_avg_sq")


def check_other_ranks(folder: Path) -> None:
    """Checkpoints of 4 ranks, with copies and without, train on 2 ranks with copies and without, to the last bit."""
    expected = read("zero3 fp32", folder / "without copies")
    assert any(value.any() for name, value in expected.items() if name.startswith("exp_avg"))
    for case in ("zero3 fp32", "zero3 fp32 hpz"):
        for source in ("without copies", "zero3 fp32 hpz"):
            found = read(case, folder / source)
            different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
            every: list = [None, None]
            dist.all_gather_object(every, different)  # a rank alone must not leave
            assert found.keys() == expected.keys() and not any(every), (source, case, every)


def check_resume(case: str, frozen: float, folder: Path) -> None:
    """A run that goes on from a checkpoint is, bit for bit, the one without a break; also on frozen weights that differ
    from those that the new engine was built with.
    """
    engine = make_engine(case, "adam")
    with torch.no_grad():
        for param in engine.module.backbone.frozen.parameters():
            param.ds_tensor.mul_(frozen)
            param.ds_secondary_tensor = None
    balancer, ema = train(engine, steps=range(2)), ShardEMA(engine, 0.5)
    ema.update()
    save(engine, ema, folder)
    found = losses(engine)
    check_consolidated(engine, folder)
    balancer.detach()
    final = weights((balancer := train(engine, steps=range(2, 5))).engine)
    ema.update()
    before = losses(engine)
    with ema.applied():
        averaged = losses(engine)
    assert losses(engine) == before != averaged
    finish(balancer)
    shards = next(folder.glob("global_step*"))
    for resharded in (False, True):
        balancer = make_balancer(make_engine(case, "adam"))
        again = balancer.engine
        losses(again)
        if resharded:
            load_resharded(again, shards)
        else:
            own_checkpoint_files(again)
            again.load_checkpoint(str(folder))
        balancer.detach()
        average = ShardEMA(again, 0.5)
        assert average.load(folder)
        assert losses(again) == found
        balancer = train(again, steps=range(2, 5))
        assert largest_change(weights(again), final) == 0.0
        average.update()
        with average.applied():
            assert losses(again) == averaged
        assert losses(again) == before
        finish(balancer)


def all_checks(folder: Path) -> dict:
    if os.environ["WORLD_SIZE"] == "2":
        return {"4 -> 2 ranks": partial(check_other_ranks, folder)}
    checks = {"without": partial(write_without, folder)}
    checks["a checkpoint without"] = partial(write_without_copies, folder / "without copies")
    checks |= {case: partial(check_exact, case, "tbgc", MICRO_STEPS["1/2/4"]) for case in HPZ}
    checks["sketch, delayed, absent tasks, kept weights"] = partial(check_same_as_without, folder)
    checks["gathered within groups"] = check_gathered_within_groups
    for case in ("zero3 fp32 hpz", "zero3 bf16 hpz"):
        checks[f"resume {case}"] = partial(check_resume, case, 3.0, folder / case)
    return checks


if __name__ == "__main__":
    run_checks(all_checks(FOLDER), sys.argv[1])
