"""Two ranks: metrics of unequal numbers of images, and ZeRO-3 in bfloat16. Started by test_kinds.py."""

import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from tests.launcher import run_checks
from tests.tasks.kinds import KINDS, kind_model, kind_samples


def predictions_of(task, made: list[dict]) -> list[dict]:
    """Return predictions that are near the truth of some images and far from that of others."""
    generator = torch.Generator().manual_seed(5)
    predictions = []
    for i, sample in enumerate(made):
        shift = float(i % 4)
        boxes = sample["boxes"].as_subclass(Tensor) + shift
        predictions.append({
            "boxes": boxes,
            "labels": sample["labels"],
            "masks": sample["masks"].as_subclass(Tensor).roll(int(shift), -1).bool(),
            "keypoints": sample["keypoints"].as_subclass(Tensor) + shift / 2,
            "point_scores": torch.ones(1, 3),
            "embedding": torch.randn(4, generator=generator) + torch.eye(4)[sample["label"]] / 2,
            "value": sample["value"].nan_to_num(3.0) + shift,
            "scores": torch.rand(3 if task.kind == "attributes" else 1, generator=generator),
        })  # fmt: skip
    return predictions


def check_metrics() -> None:
    for name in KINDS:
        made = kind_samples(7, kind=name)
        torch.manual_seed(3)
        task = kind_model(name).tasks[name]
        predictions = predictions_of(task, made)
        single = task.metric()
        initialized, dist.is_initialized = dist.is_initialized, lambda: False
        try:
            single.update(predictions, made)
            expected, details = single.compute(), task.details(single)
        finally:
            dist.is_initialized = initialized
        for parts in ((slice(0, 5), slice(5, 7)), (slice(0, 7), slice(7, 7))):
            part = parts[dist.get_rank()]
            metric = task.metric()
            metric.update(predictions[part], made[part])
            assert metric.compute() == expected, (name, metric.compute(), expected)
            assert task.details(metric) == details
        assert any(0 < value < 1 for value in expected.values()), (name, expected)


def check_zero3() -> None:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "steps_per_print": 1000000,
    }
    alive = HfDeepSpeedConfig(settings)  # noqa: F841, transformers holds it by a weak reference
    model = kind_model(*KINDS)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    losses: dict[str, list[float]] = {}
    for _ in range(4):
        for name, task in engine.module.tasks.items():
            made = kind_samples(4, boxes=dist.get_rank() == 0, kind=name)  # rank 1 has no targets
            out = engine(task=name, **task.collate(made))
            assert out.loss.dtype == torch.float32 and out.loss.isfinite(), name
            engine.backward(out.loss)
            engine.step()
            losses.setdefault(name, []).append(out.loss.item())
    engine.eval()
    with torch.no_grad():
        for name, task in engine.module.tasks.items():
            out = engine(task=name, pixel_values=task.collate(kind_samples(2))["pixel_values"])
            assert len(task.predict(out, [(32, 32)] * 2)) == 2
    if dist.get_rank() == 0:
        for name in ("binary", "numbers", "arcface", "mask2former"):
            assert losses[name][-1] < losses[name][0], (name, losses)
    engine.destroy()


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
