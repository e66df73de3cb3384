"""Models built under ZeRO-3 (`HfDeepSpeedConfig`): every head trains, and its weights are initialised. Started by
test_ranks.py."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.integrations import HfDeepSpeedConfig

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks.frequencies import use_frequencies
from tests.launcher import run_checks
from tests.tasks.dense.tiny import HEADS as DENSE
from tests.tasks.dense.tiny import dense_model, dense_samples
from tests.tasks.heads import HEADS
from tests.tiny import samples, tiny_backbone, tiny_model


def heads():
    picked = {"det": "rf_detr", "seg": "upernet", "cls": "linear"}
    return {name: HEADS[head][1:] for name, head in picked.items()}


def train(kind: dict[str, tuple[str, dict]], bf16: bool) -> None:
    plain = {key: tuple(p.shape) for key, p in tiny_model(kind).named_parameters()}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 1000000,
    }
    alive = HfDeepSpeedConfig(settings)  # noqa: F841, transformers holds it by a weak reference
    model = tiny_model(kind)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for key, parameter in engine.module.named_parameters():
        assert tuple(parameter.ds_shape) == plain[key], key
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.isfinite().all() and (parameter.ndim < 2 or parameter.abs().max() < 10), key
    losses: dict[str, list[float]] = {}
    for _ in range(4):
        for name, task in engine.module.tasks.items():
            made = samples(4, boxes=dist.get_rank() == 0)  # rank 1 has images without objects
            out = engine(task=name, **task.collate(made))
            assert out.loss.dtype == torch.float32 and out.loss.isfinite(), name
            engine.backward(out.loss)
            engine.step()
            losses.setdefault(name, []).append(out.loss.item())
    engine.eval()
    with torch.no_grad():
        for name, task in engine.module.tasks.items():
            out = engine(task=name, **task.collate(samples(2)))
            assert len(task.predict(out, [(32, 32)] * 2)) == 2
    assert losses["cls"][-1] < losses["cls"][0], losses
    assert losses["seg"][-1] < losses["seg"][0], losses
    engine.destroy()


def check_float32() -> None:
    train(heads(), bf16=False)


def check_bfloat16() -> None:
    train(heads(), bf16=True)
    train({"det": HEADS["fcos-pyramid"][1:], "seg": HEADS["light"][1:], "cls": HEADS["linear"][1:]}, bf16=True)
    train({"det": HEADS["fcos"][1:], "seg": HEADS["mask2former"][1:], "cls": HEADS["sub-center"][1:]}, bf16=True)


def check_dense_kinds() -> None:
    """Maps, of which rank 1 has none, train every head of theirs, with their priors, in bfloat16."""
    heads = {name: DENSE[name] for name in ("depth-dpt", "normals", "edges", "saliency-dpt")}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "steps_per_print": 1000000,
    }
    alive = HfDeepSpeedConfig(settings)  # noqa: F841, transformers holds it by a weak reference
    model = dense_model(heads)
    data: Any = dict.fromkeys(heads, dense_samples())
    assert len(use_frequencies(dict(model.tasks), data)) == 2
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    losses: dict[str, list[float]] = {}
    for _ in range(5):
        for name, task in engine.module.tasks.items():
            made = dense_samples(4)
            made = made if dist.get_rank() == 0 else [task.unlabelled(sample) for sample in made]
            out = engine(task=name, **task.collate(made))
            assert out.loss.dtype == torch.float32 and out.loss.isfinite(), name
            assert (out.loss.item() > 0) == (dist.get_rank() == 0)
            engine.backward(out.loss)
            engine.step()
            losses.setdefault(name, []).append(out.loss.item())
    if dist.get_rank() == 0:
        assert all(min(values[1:]) < values[0] for values in losses.values()), losses
    engine.destroy()


def check_pretrained() -> None:
    """Prefixed weights and interpolated positions reach a partitioned backbone as they reach a whole one."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        torch.manual_seed(7)
        tiny_backbone(stem="patch").net.save_pretrained(folder[0])
        file = Path(folder[0]) / "model.safetensors"
        state = {f"teacher.backbone.{name}": value for name, value in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    dist.barrier()
    cfg = BackboneConfig(checkpoint=folder[0], config={"image_size": 64})  # type: ignore[call-arg]
    plain = build_backbone(cfg)
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    alive = HfDeepSpeedConfig(settings)  # noqa: F841, transformers holds it by a weak reference
    partitioned = build_backbone(cfg)
    assert partitioned.loaded == plain.loaded and plain.loaded.complete and plain.loaded.resized
    for (name, mine), (_, theirs) in zip(partitioned.named_parameters(), plain.named_parameters(), strict=True):
        assert hasattr(mine, "ds_shape"), name
        with deepspeed.zero.GatheredParameters([mine]):
            assert torch.equal(mine, theirs), name
    for wrong in ({"num_hidden_layers": 4}, {"hidden_size": 64}):  # every rank refuses, none waits for the others
        try:
            build_backbone(BackboneConfig(checkpoint=folder[0], config=wrong))  # type: ignore[call-arg]
        except ConfigError:
            continue
        raise AssertionError(wrong)


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
