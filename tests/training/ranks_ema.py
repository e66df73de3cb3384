"""Averaged weights on every engine kind, large backbones created partitioned, compiled forwards. Started by
test_ema.py."""

import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch._dynamo
import torch.distributed as dist
from accelerate.utils.other import compile_regions_deepspeed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import HfDeepSpeedConfig

from allinone_ds import TBGC, TaskBalancer
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.training.ema import ShardEMA, ema_file
from allinone_ds.training.optimizer import parameter_groups
from allinone_ds.zero.checkpoint.write import save_engine
from allinone_ds.zero.engines.choose import open_engine
from tests.balance.engines import CASES, finish, make_balancer, make_engine, run_task, toy, weights
from tests.launcher import run_checks
from tests.tiny import samples, tiny_model

EMA_KINDS = ("zero0 fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "zero2 fp32 offload", "zero3 fp32 offload",
             "zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16", "zero1 bf16 fp32-accumulation")  # fmt: skip


def check_average(case: str) -> None:
    engine = make_engine(case, "adam")
    balancer = make_balancer(engine)
    decay = 0.3
    ema = ShardEMA(engine, decay)
    expected, elements = weights(engine), sum(p.numel() for p in weights(engine).values())
    for step in range(3):
        for task in toy.TASKS:
            run_task(balancer, task, step)
        balancer.step()
        ema.update()
        d = min(decay, (2 + step) / (11 + step))
        expected = {name: d * expected[name] + (1 - d) * now for name, now in weights(engine).items()}
    before = weights(engine)
    tolerance = 1e-6 if "fp32" in case.split()[1] and "bf16" not in case else 2e-2
    moved = 0.0
    if case.startswith("zero3"):  # small parameters stay gathered between steps; `weights` put them away
        small = [p for p in engine.module.parameters() if p.ds_persist]
        small[0].all_gather(small)
    with ema.applied():
        # what a forward finds, before `weights` gathers: of ZeRO-3 the small parameters alone
        there = {name: p.detach().double().clone() for name, p in engine.module.named_parameters() if p.numel()}
        assert there, case
        for name, value in [*there.items(), *weights(engine).items()]:
            torch.testing.assert_close(
                value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{case} {m}"
            )
            moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 2e-3, moved  # the average is not the weights
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before), case
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(str(shared[0]))
    assert save_engine(engine, folder) == []
    again = ShardEMA(engine, decay)
    assert not again.load(folder)
    dist.barrier()
    torch.save(ema.state_dict(), ema_file(folder, dist.get_rank(), 2))
    dist.barrier()
    assert again.load(folder) and again.steps == 3
    if case.startswith("zero0"):
        assert all(torch.equal(mine, saved) for mine, saved in zip(again.shards, ema.shards, strict=True))
    else:  # padding is never set, so it may be anything
        for f in open_engine(engine).fragments():
            mine, saved = (e.shards[f.group].view(-1)[f.start : f.start + f.length] for e in (again, ema))
            assert torch.equal(mine, saved), (case, f)
    held = sum(shard.numel() for shard in ema.shards)
    if not case.startswith("zero0"):
        assert held < 0.6 * elements, (case, held, elements)
    for task in toy.TASKS:  # and training goes on
        run_task(balancer, task, 3)
    assert balancer.step().applied or "fp16" in case
    finish(balancer)


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes of tensors alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def check_no_rank_holds_the_whole_backbone() -> None:
    cfg = BackboneConfig(
        config={"hidden_size": 64, "num_hidden_layers": 24, "num_attention_heads": 2, "image_size": 28}
    )
    whole = sum(p.numel() for p in build_backbone(cfg).parameters())
    alive = HfDeepSpeedConfig(  # noqa: F841, read through a weak reference
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    )
    with PeakBytes() as bytes_made:
        backbone = build_backbone(cfg)
    partitioned = [p for p in backbone.parameters() if hasattr(p, "ds_id")]
    assert len(partitioned) == len(list(backbone.parameters()))
    assert all(p.numel() == 0 for p in partitioned)  # nothing stays gathered
    mine = sum(p.ds_tensor.numel() for p in partitioned)
    assert sum(p.ds_numel for p in partitioned) == whole
    assert mine <= whole / dist.get_world_size() + 64 * len(partitioned), (mine, whole)
    assert mine * 4 < bytes_made.peak < 0.75 * whole * 4, (bytes_made.peak, whole * 4)


def trained(case: str, compiled: str = "") -> dict[str, torch.Tensor]:
    """Weights after two steps of a tiny run of one task; of it "whole" forwards or "layers" are compiled."""
    heads = {"cls": ("linear", {})}
    model = tiny_model(heads, stem="patch", num_hidden_layers=1)
    config = CASES[case].config()
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(parameter_groups(model, 0.5, 0.0, 1.0)), config=config
    )[0]
    if compiled == "whole":
        engine.compile(backend="aot_eager")
    elif compiled == "layers":
        compile_regions_deepspeed(engine.module, backend="aot_eager")
    balancer = TaskBalancer(engine, tuple(heads), "backbone", TBGC(0.1))
    for step in range(2):
        for name in heads:
            batch = model.tasks[name].collate(samples(4)[step + dist.get_rank() :][:2])
            with balancer.task(name, 1):
                balancer.backward(engine(task=name, **batch).loss)
        balancer.step()
    found = weights(engine)
    finish(balancer)
    return found


def check_compiled(case: str, what: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = trained(case), trained(case, what)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    fresh = dict(tiny_model({"cls": ("linear", {})}, stem="patch", num_hidden_layers=1).named_parameters())
    moved = max(float((plain[name] - value.detach()).abs().max()) for name, value in fresh.items())
    assert moved > 1e-3, moved
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name} {m}")


COMPILED = [("zero2 fp32", "layers"), ("zero3 fp32", "layers"), ("zero2 fp32", "whole"), ("zero3 fp32", "whole")]

if __name__ == "__main__":
    checks = {f"check_average {kind}": partial(check_average, kind) for kind in EMA_KINDS}
    checks["check_no_rank_holds_the_whole_backbone"] = check_no_rank_holds_the_whole_backbone
    checks |= {f"check_compiled {case} {what}": partial(check_compiled, case, what) for case, what in COMPILED}
    run_checks(checks, sys.argv[1])
