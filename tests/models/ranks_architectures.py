"""Every architecture under ZeRO-3, built in partitions: balanced steps of three tasks. Started by test_ranks.py."""

import shutil
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from allinone_ds import TBGC, TaskBalancer
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks import build_task
from allinone_ds.training.optimizer import parameter_groups
from tests.launcher import run_checks
from tests.models.nets import TIMM, settings
from tests.tiny import CLASSES, LIGHT, TYPES, samples

SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "steps_per_print": 1000000,
}


def build(name: str) -> AllInOneModel:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(**settings(name)))
    tasks = {
        task: build_task(TYPES[task], task, CLASSES, backbone, backbone.fixed_size or (64, 64), head, options)
        for task, (head, options) in LIGHT.items()
    }
    return AllInOneModel(backbone, tasks)


def larger(sample: dict, factor: int = 2) -> dict:
    big = {key: sample[key].repeat_interleave(factor, -2).repeat_interleave(factor, -1) for key in ("image", "mask")}
    return {**sample, **big, "boxes": sample["boxes"] * factor}


def train(name: str) -> None:
    """Compare shapes with the net built in one piece, and train: all losses fall on the samples of the steps."""
    plain = {key: tuple(p.shape) for key, p in build(name).named_parameters()}
    alive = HfDeepSpeedConfig(SETTINGS)  # noqa: F841, transformers holds it by a weak reference
    model = build(name)
    if name not in TIMM:  # those are partitioned by deepspeed.initialize
        assert all(hasattr(p, "ds_id") for p in model.backbone.parameters()), name
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0, 1.0, layer_lr_decay=0.9))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)[0]
    for key, parameter in engine.module.named_parameters():
        assert tuple(parameter.ds_shape) == plain[key], (name, key)
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.isfinite().all() and (parameter.ndim < 2 or parameter.abs().max() < 10), (name, key)
    balancer = TaskBalancer(engine, tuple(LIGHT), "backbone", TBGC(1.0))
    made = [larger(sample) for sample in samples(4)]
    losses: dict[str, list[float]] = {}
    for _ in range(4):
        for task in LIGHT:
            batch = engine.module.tasks[task].collate(made[dist.get_rank() :: 2])
            with balancer.task(task, 1):
                loss = engine(task=task, **batch).loss
                balancer.backward(loss)
        report = balancer.step()
        for task in LIGHT:
            assert float(report.norms[task]) > 0, (name, task)
            losses.setdefault(task, []).append(float(report.losses[task]))
    assert all(min(values[1:]) < values[0] for values in losses.values()), (name, losses)
    engine.destroy()


def load(name: str) -> None:
    """A folder gives the same maps in partitions as in one piece."""
    torch.manual_seed(0)
    plain = build_backbone(BackboneConfig(**settings(name))).eval()
    for buffer in plain.buffers():  # of frozen BatchNorms
        buffer.add_(0.5) if buffer.is_floating_point() else None
    pixels = torch.randn(1, 3, 64, 64)
    expected = plain(pixels).feature_maps[0]
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        plain.net.save_pretrained(folder[0])
    dist.barrier()
    alive = HfDeepSpeedConfig(SETTINGS)  # noqa: F841, transformers holds it by a weak reference
    backbone = build_backbone(BackboneConfig(name=folder[0]))
    tasks = {"cls": build_task("classification", "cls", CLASSES, backbone, (64, 64))}
    model = AllInOneModel(backbone, tasks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)[0]
    with torch.no_grad():
        found = engine.module.eval().backbone(pixels).feature_maps[0]
    torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")
    engine.destroy()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def check_vits() -> None:
    for name in ("dinov2", "vit", "deit", "vit_mae", "beit"):
        train(name)


def check_windows() -> None:
    for name in ("swin", "swinv2", "hiera"):
        train(name)


def check_convolutions() -> None:
    for name in ("convnext", "convnextv2", "dinov3_convnext"):
        train(name)


def check_timm() -> None:
    for name in TIMM:
        train(name)
        load(name)


def check_folders() -> None:
    for name in ("vit", "vit_mae", "beit", "swin", "convnext", "hiera"):
        load(name)


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
