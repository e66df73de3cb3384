"""Two ranks: metrics of unequal numbers of images, and ZeRO-3 in bfloat16. Started by test_kinds.py."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from allinone_ds.data.demo import JointSizes, make_joint_demo_data
from allinone_ds.evaluation.predictor import predict_images
from allinone_ds.export.folders import export_run
from allinone_ds.run_config.schema import load_config
from allinone_ds.training.run import train_run
from tests.launcher import ROOT, run_checks
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
            torch.manual_seed(1)  # mask2former looks at random points, the same in every step
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


def check_strong_heads() -> None:
    """A run from YAML with the strong heads: trained, evaluated, predicted and exported."""
    folder = Path(sys.argv[1]).parent
    if dist.get_rank() == 0:
        make_joint_demo_data(folder / "data", sizes=JointSizes(train=8, test=3), progress=False)
    dist.barrier()
    content = yaml.safe_load((ROOT / "configs/runs/demo_joint.yaml").read_text())
    decoder = {"num_queries": 8, "encoder_layers": 1, "decoder_layers": 2, "points": 64, "width": 32}
    heads = {
        "segmentation": {"type": "segmentation", "head": "mask2former", "options": decoder},
        "instances": {"type": "instances", "head": "mask2former", "options": decoder},
        "depth": {"type": "depth", "head": "dpt", "options": {"width": 16, "neck_widths": [16, 16, 16, 16]}},
    }
    joint = content["joint"]["scenes"] | {"tasks": list(heads), "batch_size": 2, "eval_batch_size": 3}
    for split in ("train", "test"):
        labels = joint[split]["labels"]
        labels["instances"] = {"format": "coco", "kind": "instances", "annotations": f"{split}/objects.json"}
        joint[split]["labels"] = {name: labels[name] for name in heads}
    content |= {"tasks": heads, "joint": {"scenes": joint}, "data_root": str(folder / "data")}
    content |= {"output_dir": str(folder / "strong"), "deepspeed": str(ROOT / content["deepspeed"])}
    content["trainer"] |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    content["model"]["backbone"]["config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    content["model"]["backbone"]["out_indices"] = [1, 2]
    if dist.get_rank() == 0:
        (folder / "strong.yaml").write_text(yaml.safe_dump(content))
    dist.barrier()
    metrics = train_run(load_config(folder / "strong.yaml"))
    assert metrics is not None
    assert {"eval_instances_map50", "eval_segmentation_miou", "eval_depth_delta1"} <= metrics.keys()
    if dist.get_rank() == 0:
        pictures = sorted((folder / "data" / "test" / "images").iterdir())[:1]
        predict_images(folder / "strong", pictures, folder / "predicted")
        (line,) = (folder / "predicted" / "predictions.jsonl").read_text().splitlines()
        assert set(json.loads(line)) >= set(heads)
        export_run(folder / "strong")
        cards = "".join(path.read_text() for path in (folder / "strong" / "export").rglob("README.md"))
        assert "(instances, head mask2former" in cards and "(depth, head dpt" in cards
    dist.barrier()


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
