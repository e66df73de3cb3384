"""Runs that train parts of their parameters, or train them differently, on two ranks. Started by test_parameters.py."""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from allinone_ds import TBGC, AllInOneModel, TaskBalancer
from allinone_ds.distributed import barrier, rank, world_size
from allinone_ds.errors import ConfigError
from allinone_ds.export.folders import export_run
from allinone_ds.models.lora import LoraOptions, add_lora, is_adapter, shared_parameters
from allinone_ds.run_config.schema import load_config
from allinone_ds.run_folder.weights import read_weights
from allinone_ds.training import run
from allinone_ds.training.optimizer import parameter_groups
from tests.export.untrained import untrained_run
from tests.launcher import run_checks
from tests.tiny import LIGHT, tiny_model

HOME = Path(sys.argv[2])
SHORT = ["trainer.eval_strategy=no", "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.ema_decay=0.5",
         "balancer.max_norm=0.01", "trainer.weight_decay=0.1"]  # fmt: skip
THAW = ["model.freeze=backbone", "model.thaw={2: 1, 3: null}"]


def trained(name: str, *overrides: str, stage: int = 2, after: Path | None = None) -> Path:
    """Train the tiny run, from a checkpoint if one is given; return its folder."""
    folder = HOME / name
    given = [f"output_dir={folder}", f"deepspeed.zero_optimization.stage={stage}", *SHORT, *overrides]
    if after is not None:
        if rank() == 0:
            shutil.copytree(after, folder / after.name)
        barrier()
        given.append("trainer.resume_from_checkpoint=true")
    run.train_run(load_config(HOME / "tiny.yaml", given))
    barrier()
    return folder


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def events(folder: Path, kind: str) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["message"]) for line in lines if line["event"] == kind]


def averages(folder: Path, step: int) -> list[Tensor]:
    files = sorted((folder / f"checkpoint-{step}").glob("ema_rank_*"))
    return [shard for file in files for shard in torch.load(file, weights_only=True)["shards"]]


def history(folder: Path, key: str, step: int = 4) -> list[float]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if "loss" in entry]


@cache
def thawed(stage: int) -> Path:
    """A run whose backbone is frozen for two steps, and its first layer for three."""
    return trained(f"thawed{stage}", *THAW, stage=stage)


def check_thaw(stage: int) -> None:
    """What is frozen stands still, trains from its step on, and a resume before or at a thaw changes nothing."""
    whole = thawed(stage)
    steps = {step: weights(whole, step) for step in (1, 2, 3, 4)}
    for name in (n for n in steps[1] if n.startswith("backbone.") and not n.endswith("mask_token")):
        moved = [not torch.equal(steps[step][name], steps[step + 1][name]) for step in (1, 2, 3)]
        first = ".embeddings." in name or ".layer.0." in name
        assert moved == [False, not first, True], (name, moved)
    assert all(not torch.equal(steps[1][name], steps[2][name]) for name in steps[1] if name.endswith("cls_head.weight"))
    assert history(whole, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for begin in (1, 2) if stage > 1 else (1,):  # before and at a thaw
        again = trained(f"again{stage}from{begin}", *THAW, stage=stage, after=whole / f"checkpoint-{begin}")
        found = weights(again, 4)
        assert all(torch.equal(found[name], value) for name, value in steps[4].items())
        if rank() == 0:
            pairs = zip(averages(again, 4), averages(whole, 4), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    if rank() == 0:
        assert [step for step, _ in events(whole, "note") if _.startswith("model.thaw")] == [2, 3]
        assert [step for step, text in events(whole, "warning") if "nothing to balance" in text] == [0]


def check_thaw_across_stages() -> None:
    """The stages agree, and a checkpoint from before the thaw resumes on another stage."""
    expected = weights(thawed(1), 4)
    found = weights(trained("resharded", *THAW, stage=3, after=thawed(2) / "checkpoint-1"), 4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)
    with pytest.raises(
        ConfigError, match="was saved with the stages .'backbone', 1, None., this run has .'backbone', No"
    ):
        trained("other", "model.freeze=backbone", "model.thaw={2: null}", after=thawed(2) / "checkpoint-1")


LORA = LoraOptions(rank=3, target_modules=["q_proj", "v_proj"])
OWN = LoraOptions(rank=2)


def _adapted_model() -> AllInOneModel:
    """A model with shared adapters, and adapters of the task "seg" in more layers, none of them zero."""
    model = tiny_model({name: LIGHT[name] for name in ("seg", "cls")}, stem="patch")
    add_lora(model.backbone, LORA)
    add_lora(model.backbone, OWN, "seg")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.backbone.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def _batch(task: str, step: int, of_rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7 * step + of_rank + (100 if task == "seg" else 0))
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    shape = (2, 32, 32) if task == "seg" else (2,)
    return {"pixel_values": pixels, "labels": torch.randint(3, shape, generator=generator)}


STEPS = (("seg", "cls"), ("cls",), ("seg", "cls"))


def _adapted_reference() -> dict[str, Tensor]:
    """Train in float64 on one process: norms over the shared adapters alone, own adapters scaled as their head is."""
    model = _adapted_model().double()
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, 0.1, 1.0), momentum=0.9)
    shared = shared_parameters(model.backbone)
    for step, tasks in enumerate(STEPS):
        optimizer.zero_grad()
        for task in tasks:
            losses = [model(task, **_batch(task, step, of_rank)).loss for of_rank in range(world_size())]
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.autograd.grad(torch.stack(losses).mean(), trained, allow_unused=True)
            gradients = {id(p): g for p, g in zip(trained, found, strict=True) if g is not None}
            norm = torch.cat([gradients[id(p)].flatten() for p in shared if id(p) in gradients]).norm()
            for parameter in trained:
                if (gradient := gradients.get(id(parameter))) is not None:
                    scaled = gradient * min(1.0, 0.01 / (float(norm) + 1e-6))
                    parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        optimizer.step()
    return dict(model.named_parameters())


def check_adapters_equal_the_reference() -> None:
    expected = _adapted_reference()
    start = dict(_adapted_model().named_parameters())
    for stage in (0, 1, 2, 3):
        for checkpointing in (False, True):
            model = _adapted_model()
            if checkpointing:
                model.activation_checkpointing_enable()
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": zero,
                      "zero_allow_untested_optimizer": True}  # fmt: skip
            optimizer = torch.optim.SGD(parameter_groups(model, 1.0, 0.1, 1.0), momentum=0.9)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            balancer = TaskBalancer(engine, ("seg", "cls"), shared_parameters(model.backbone), TBGC(0.01))
            for step, tasks in enumerate(STEPS):
                for task in tasks:
                    with balancer.task(task):
                        loss = engine(task=task, **_batch(task, step, rank())).loss
                        with torch.no_grad():  # a forward of another task before the backward changes nothing
                            engine(task="cls", **_batch("cls", 9, rank()))
                        balancer.backward(loss)
                balancer.step(require_all=False)
            for name, parameter in model.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    change, wanted = parameter.detach() - start[name], expected[name].detach() - start[name]
                where = f"ZeRO-{stage}, checkpointing {checkpointing}, {name}"
                torch.testing.assert_close(change.double(), wanted, rtol=1e-3, atol=3e-6, msg=where)
                assert bool(change.any()) == (is_adapter(name) or name.startswith("tasks.")), where
            balancer.detach()
            engine.destroy()


ADAPTED = [
    f"model.start_from={HOME / 'earlier'}",
    "model.backbone.stem=patch",
    "model.lora={rank: 4, target_modules: [q_proj, v_proj]}",
    "tasks.det.lora={rank: 2}",
    "trainer.gradient_checkpointing=true",
    "trainer.learning_rate=0.01",
]


@cache
def adapted(stage: int) -> Path:
    """A run with shared adapters and those of the task "det"."""
    if rank() == 0 and not (HOME / "earlier").exists():
        untrained_run(HOME / "earlier", home=HOME)
    barrier()
    return trained(f"adapted{stage}", *ADAPTED, stage=stage)


def check_own_adapters_in_a_run() -> None:
    """They train, and resume bit for bit."""
    runs = {stage: weights(adapted(stage), 4) for stage in (1, 3)}
    start = weights(adapted(1), 1)
    own = [name for name in start if ".lora_" in name and ".det." in name]
    assert len(own) == 2 * 12 and len([name for name in start if ".lora_" in name]) == 2 * (12 + 4)
    for name, value in runs[1].items():
        trains = ".lora_" in name or name.startswith("tasks.")
        assert torch.equal(value, start[name]) != trains or name.endswith(("running_mean", "running_var")), name
    for stage, found in runs.items():
        again = trained(f"adapted{stage}again", *ADAPTED, stage=stage, after=adapted(stage) / "checkpoint-2")
        resumed = weights(again, 4)
        assert all(torch.equal(value, resumed[name]) for name, value in found.items())


SCHEDULES = ["tasks.det.schedule={type: constant_with_warmup, warmup_steps: 3}", "tasks.det.lr_factor=2",
             "tasks.cls.schedule={type: cosine}"]  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_checkpoints_without_frozen_weights(stage: int) -> None:
    """They are smaller by the base, resume as the whole ones do, load, and refuse another base."""
    save = ["trainer.save_frozen=false", f"trainer.async_save={stage == 3}"]
    whole, small = adapted(stage), trained(f"small{stage}", *ADAPTED, *save, stage=stage)
    expected, checkpoint = weights(whole, 4), small / "checkpoint-2"
    base = load_file(small / "frozen.safetensors")
    size = sum(value.numel() * value.element_size() for value in base.values())
    assert _bytes(whole / "checkpoint-2") - _bytes(checkpoint) > 1.9 * size  # model.safetensors, and DeepSpeed's files
    found = weights(small, 4)
    assert not found.keys() & base.keys() and found.keys() | base.keys() == expected.keys()
    assert all(torch.equal(value, {**base, **found}[name]) for name, value in expected.items())
    for shards in (False, True):  # what `load`, `export` and `start_from` read
        read, _ = read_weights(small / "checkpoint-4", prefer_shards=shards)
        assert all(torch.equal(value, read[name]) for name, value in expected.items())
    again = HOME / f"small{stage}again"
    if rank() == 0:
        again.mkdir()
        shutil.copy(small / "frozen.safetensors", again)
    barrier()
    trained(again.name, *ADAPTED, "trainer.save_frozen=false", stage=stage, after=checkpoint)
    resumed = weights(again, 4)
    assert all(torch.equal(value, resumed[name]) for name, value in found.items())
    if rank() == 0:
        save_file({name: value + 1 for name, value in base.items()}, again / "frozen.safetensors")
        with pytest.raises(ConfigError, match="saved without its frozen weights .* has others"):
            read_weights(again / "checkpoint-4")
        (again / "frozen.safetensors").unlink()
        with pytest.raises(ConfigError, match="frozen.safetensors is missing"):
            read_weights(again / "checkpoint-4", prefer_shards=True)
    barrier()


def check_schedules_of_heads() -> None:
    """Each head follows its own schedule, before and after a resume; the others follow that of the run."""
    whole = trained("schedules", *SCHEDULES)
    again = trained("schedules again", *SCHEDULES, after=whole / "checkpoint-2")
    rates = {
        "learning_rate": [1e-3, 7.5e-4, 5e-4, 2.5e-4],
        "learning_rate/det": [0, 2e-3 / 3, 4e-3 / 3, 2e-3],
        "learning_rate/cls": [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)],
    }
    usual = weights(trained("usual", "tasks.det.lr_factor=2", "trainer.max_steps=1"), 1)
    first = weights(whole, 1)
    for folder in (whole, again):
        for key, values in rates.items():
            assert history(folder, key) == pytest.approx(values), (folder, key)
    found, expected = weights(again, 4), weights(whole, 4)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    same = {name: torch.equal(value, usual[name]) for name, value in first.items()}
    assert all(same[name] for name in same if name.startswith("tasks.seg."))
    assert not any(same[name] for name in same if name.startswith("tasks.det.") and name.endswith("conv.weight"))


def check_tied_weights() -> None:
    """A weight of backbone and head trains as the backbone's; checkpoints hold it under both names and resume."""
    build, names = run.build_model, ("backbone.net.layernorm.weight", "tasks.seg.segmenter.fuse.norm.weight")

    def tied(*args: Any) -> AllInOneModel:
        model = build(*args)
        model.tasks["seg"].segmenter.fuse.norm.weight = model.backbone.net.layernorm.weight
        return model

    run.build_model = tied
    try:
        for stage in (1, 3):
            whole = trained(f"tied{stage}", stage=stage)
            found = weights(whole, 4)
            assert torch.equal(found[names[0]], found[names[1]])
            assert not torch.equal(found[names[0]], weights(whole, 1)[names[0]])
            resumed = weights(trained(f"tied{stage}again", stage=stage, after=whole / "checkpoint-2"), 4)
            assert all(torch.equal(resumed[name], value) for name, value in found.items())
    finally:
        run.build_model = build


def check_copies_of_weights_change_nothing() -> None:
    """Adapters, heads and averages of a run whose ranks copy all weights (hpZ); switched on and off at a resume."""
    copies = "deepspeed.zero_optimization.zero_hpz_partition_size=2"
    whole = adapted(3)
    on = trained("copies", *ADAPTED, copies, stage=3, after=whole / "checkpoint-1")
    off = trained("copies no more", *ADAPTED, stage=3, after=on / "checkpoint-2")
    expected = weights(whole, 4)
    for folder in (on, off):
        found = weights(folder, 4)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        pairs = zip(averages(folder, 4), averages(whole, 4), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    unset_hf_deepspeed_config()  # else ZeRO-3 would partition the exported models
    if rank() == 0:
        for folder in (whole, on):
            export_run(folder / "checkpoint-4", folder / "export")
        files = [file.relative_to(whole) for file in (whole / "export").rglob("*.safetensors")]
        assert len(files) == 7  # three tasks, the model, the backbone, two kinds of adapters
        for file in files:
            one, other = load_file(whole / file), load_file(on / file)
            assert one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())
    barrier()


if __name__ == "__main__":
    run.finish_run = lambda trainer, metrics: None  # no evaluation, plots and pages
    checks = {f"check_thaw {stage}": partial(check_thaw, stage) for stage in (0, 1, 2, 3)}
    without = check_checkpoints_without_frozen_weights
    checks |= {n: f for n, f in globals().items() if n.startswith("check_") and f not in (check_thaw, without)}
    checks |= {f"{without.__name__} {stage}": partial(without, stage) for stage in (1, 3)}
    last = check_copies_of_weights_change_nothing.__name__  # later runs of a process have copies too
    checks[last] = checks.pop(last)
    wanted = sys.argv[3:]
    run_checks({n: c for n, c in checks.items() if not wanted or any(w in n for w in wanted)}, sys.argv[1])
