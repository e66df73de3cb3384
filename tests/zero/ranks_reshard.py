"""Checkpoints on other ranks and other ZeRO stages, for every engine kind: 2 ranks write, 4 read and write, 1 reads.

Started by test_reshard.py. What is compared are whole tensors as DeepSpeed's own functions give them, bit for bit, and
losses of the next steps, each rank training on the micro-batches of two ranks, so that their number changes no mean.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from allinone_ds.training.ema import ShardEMA, ema_file
from allinone_ds.zero.checkpoint.layout import Segment
from allinone_ds.zero.checkpoint.reshard import load_resharded
from allinone_ds.zero.checkpoint.write import save_engine
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.engines.muon import MOMENTUM
from tests.balance.engines import finish, inputs, make_balancer, make_engine, toy
from tests.launcher import run_checks

PRECISIONS = ("fp32", "bf16", "bf16 fp32-accumulation", "fp16", "fp32 offload", "bf16 offload",
              "bf16 fp32-accumulation offload", "fp16 offload", "fp32 muon")  # fmt: skip
STAGES = (1, 2, 3)
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
NEXT_STEPS = 2


def train(balancer, step: int) -> list[float]:
    """One step; the tasks' losses."""
    for task in toy.TASKS:
        with balancer.task(task, 2):
            for rank in range(2):
                balancer.backward(balancer.engine(task, inputs(balancer.engine, task, step, 0, rank), True))
    report = balancer.step()
    assert report.applied
    return [float(loss) for loss in report.losses.values()]


@torch.no_grad()
def whole(engine, ema: ShardEMA) -> dict[str, torch.Tensor]:
    """Masters, optimizer state and average of every parameter, and what every rank knows.

    DeepSpeed's own reader of masters reads all of them: the others lie in the masters' place meanwhile. (Its reader of
    moments knows only those of groups that had stepped before the first step was over.)
    """
    masters, state = open_engine(engine).masters(), engine.optimizer.optimizer.state
    kept = [master.detach().clone() for master in masters]
    kinds = {"": kept, " average": ema.shards}
    for key in ("exp_avg", "exp_avg_sq", MOMENTUM):
        if any(key in state[master] for master in masters):
            kinds[f" {key}"] = [state[master].get(key, torch.zeros_like(master)) for master in masters]
    found = {}
    for kind, flats in kinds.items():
        for master, flat in zip(masters, flats, strict=True):
            master.data.copy_(flat.view_as(master))
        for name, param in engine.module.named_parameters():
            if param.requires_grad:
                found[name + kind] = safe_get_full_fp32_param(param).flatten().clone()
    for master, flat in zip(masters, kept, strict=True):
        master.data.copy_(flat)
    steps = {float(state[master]["step"]) for master in masters if "step" in state[master]}
    found["counters"] = torch.tensor(
        [*steps, engine.global_steps, ema.steps, getattr(engine.optimizer, "loss_scale", 1)]
    )
    return found


@torch.no_grad()
def spoil_padding(engine, ema: ShardEMA) -> None:
    """Nobody sets it, so nothing may depend on it."""
    for flats in (open_engine(engine).masters(), ema.shards):
        for group, flat in enumerate(flats):
            inside = torch.zeros(flat.numel(), dtype=torch.bool)
            for f in open_engine(engine).fragments():
                if f.group == group:
                    inside[f.start : f.start + f.length] = True
            flat.data.view(-1)[~inside] = float("nan")


def save(engine, ema: ShardEMA, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    assert save_engine(engine, folder) == []
    torch.save(ema.state_dict(), ema_file(folder, dist.get_rank(), dist.get_world_size()))


def write(case: str, folder: Path) -> None:
    engine = make_engine(case, "adam")
    balancer, ema = make_balancer(engine), ShardEMA(engine, 0.5)
    for step in range(3):
        train(balancer, step)
        ema.update()
    spoil_padding(engine, ema)
    save(engine, ema, folder / case)
    record = whole(engine, ema)
    losses = [train(balancer, 3 + step) for step in range(NEXT_STEPS)]
    if dist.get_rank() == 0:
        torch.save({"whole": record, "losses": losses}, folder / f"{case}.pt")
    finish(balancer)


def read(case: str, source: Path, reference: Path, target: Path | None = None) -> None:
    """Load the checkpoint `source` into an engine, compare it with what was written first, train on."""
    engine = make_engine(case, "adam")
    balancer, ema = make_balancer(engine), ShardEMA(engine, 0.5)
    load_resharded(engine, source / (source / "latest").read_text())
    assert ema.load(source)
    expected = torch.load(reference)
    found = whole(engine, ema)
    assert found.keys() == expected["whole"].keys()
    for name, value in expected["whole"].items():
        assert torch.equal(found[name], value), (case, name, found[name], value)
    spoil_padding(engine, ema)
    if target is not None:
        save(engine, ema, target)
    precision = case.split()[1]
    for step, losses in enumerate(expected["losses"]):
        torch.testing.assert_close(train(balancer, 3 + step), losses, rtol=ROUNDING[precision], atol=1e-4)
        ema.update()
    masters, average = open_engine(engine).masters(), ema.shards
    for f in open_engine(engine).fragments():
        for flats in (masters, average):
            assert flats[f.group].view(-1)[f.start : f.start + f.length].isfinite().all(), (case, f)
    finish(balancer)


OTHER = {
    "heads.cls.weight": (), "heads.cls.bias": (),  # a new task
    "late.weight": (Segment(0, 26, "heads.cls.weight", 13),), "late.bias": (Segment(0, 2, "heads.cls.bias", 1),),
    "heads.det.weight": (Segment(0, 13, "heads.det.weight", 26), Segment(26, 26, "heads.det.weight", 0)),
    "heads.det.bias": (Segment(0, 1, "heads.det.bias", 2), Segment(2, 2, "heads.det.bias", 0)),
}  # fmt: skip
"""A run with a new task, one with a new name and fewer classes, and one whose classes are others in another order."""


def read_other_tasks(case: str, source: Path, reference: Path) -> None:
    """What no segment covers is as in a new run: weights as they were, no moments, no steps in a group of its own."""
    engine = make_engine(case, "adam")
    balancer, ema = make_balancer(engine), ShardEMA(engine, 0.5)
    before = whole(engine, ema)
    counts = steps_of(engine)
    load_resharded(engine, source / (source / "latest").read_text(), OTHER)
    assert ema.load(source, OTHER)
    files, found = torch.load(reference)["whole"], whole(engine, ema)
    kinds = ("", " average", " exp_avg", " exp_avg_sq")
    for name in {key.split()[0] for key in found} - {"counters"}:
        for kind in kinds:
            value = found[name + kind]
            fresh = before.get(name + kind, torch.zeros_like(value))
            wanted = fresh.clone()
            for s in OTHER.get(name, (Segment(0, len(value), name, 0),)):
                wanted[s.start : s.start + s.length] = files[s.name + kind][s.offset : s.offset + s.length]
            assert torch.equal(value, wanted), (case, name, kind, value, wanted)
    for name, count in steps_of(engine).items():
        assert count == (counts[name] if name.startswith("heads.cls.") else 3.0), (case, name, count)
    spoil_padding(engine, ema)
    assert all(torch.tensor(train(balancer, 3)).isfinite())
    finish(balancer)


def steps_of(engine) -> dict[str, float]:
    """Return {parameter: steps that the optimizer counts for it on this rank}."""
    adapter = open_engine(engine)
    masters, state = adapter.masters(), engine.optimizer.optimizer.state
    return {f.name: float(state[masters[f.group]].get("step", 0)) for f in adapter.fragments()}


def all_checks(folder: Path) -> dict:
    checks: dict = {}
    copied, plain = "zero3 fp32 hpz", "zero3 fp32"  # last: later engines of a process have copies too
    copies: dict = {}
    world = int(__import__("os").environ["WORLD_SIZE"])
    for precision in PRECISIONS:
        for stage in STAGES:
            up, down = stage % 3 + 1, (stage - 2) % 3 + 1
            here = f"zero{stage} {precision}"
            reference = folder / f"{here}.pt"
            if world == 2:
                checks[f"2 ranks, {here}"] = partial(write, here, folder)
            elif world == 4:
                target = folder / "4" / here
                into = f"zero{up} {precision}"
                checks[f"2 -> 4 ranks, {here} -> {into}"] = partial(read, into, folder / here, reference, target)
                if precision in ("fp32", "bf16"):
                    checks[f"2 -> 4 ranks, {here} -> {here}"] = partial(read, here, folder / here, reference)
                if precision in ("fp32", "bf16", "fp16 offload"):
                    other = partial(read_other_tasks, into, folder / here, reference)
                    checks[f"2 -> 4 ranks, {here} -> {into}, other tasks"] = other
            else:
                for last, name in ((stage, "back"), (down, "down")):
                    into = f"zero{last} {precision}"
                    checks[f"2 -> 4 -> 1 ranks, {here} -> zero{up} -> zero{last} ({name})"] = partial(
                        read, into, folder / "4" / here, reference
                    )
    if world == 2:
        copies[f"2 ranks, {copied}"] = partial(write, copied, folder)
    elif world == 4:
        reference = folder / f"{copied}.pt"
        for here, into in ((copied, plain), (plain, copied), (copied, copied)):
            target = folder / "4" / copied if here == into else None
            copies[f"2 -> 4 ranks, {here} -> {into}"] = partial(read, into, folder / here, reference, target)
    else:
        copies[f"2 -> 4 -> 1 ranks, {copied} -> {plain}"] = partial(
            read, plain, folder / "4" / copied, folder / f"{copied}.pt"
        )
    return checks | copies


if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, not wrong
    run_checks(all_checks(Path(sys.argv[2])), sys.argv[1])
