"""Part `heads`: every head in bf16 beside float32, and a short demo."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Run, run_command

IMAGES = 4
LEAST_COSINE = 0.9
"""Between the gradients of bf16 and float32; where rounding changes what a matcher assigns they differ more."""


@dataclass
class HeadTask:
    """One task with one head, and a batch of its kind of data."""

    name: str
    data: Mapping[str, Any]

    def batch(self, device: str) -> Any:
        """Return the batch on a device."""
        return moved(self.data, device)


def moved(value: Any, device: str) -> Any:
    """Return a nested batch with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    return type(value)(moved(part, device) for part in value) if isinstance(value, (list, tuple)) else value


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row per head, and one of the demo."""
    for name, model, task in open_heads(run, first_batches(run)):
        try:
            yield {"head": name, **compared(model, task, run.device)}
        except Exception as error:
            yield {"head": name, "error": f"{type(error).__name__}: {error}"[:500]}
    yield demo(run)


def first_batches(run: Run) -> dict[str, tuple[list[str], Any]]:
    """Return kind of task -> class names and a batch of the demo's scenes."""
    from pydantic import TypeAdapter

    from allinone_ds.data.augmentation.transforms import eval_transform
    from allinone_ds.data.demo import DemoData, DemoSizes, make_demo_data
    from allinone_ds.data.sources import Source, open_source
    from allinone_ds.tasks import TASKS

    side, found = run.pick(256, 64), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_demo_data(root, sizes=DemoSizes(**dict.fromkeys(KINDS, (IMAGES, 1))), progress=False)
        for kind in KINDS:
            data = open_source(TypeAdapter(Source).validate_python(DemoData(root).sources(kind, "train")), root)
            transform = eval_transform((side, side))
            batch = TASKS[kind].collate([transform(data[index]) for index in range(IMAGES)])
            found[kind] = (list(data.classes), {key: batch[key] for key in ("pixel_values", "labels")})
    return found


KINDS = ("detection", "segmentation", "classification")
"""Kinds of tasks of which the demo has data."""


def open_heads(run: Run, batches: Mapping[str, tuple[list[str], Any]]) -> Iterator[tuple[str, Any, HeadTask]]:
    """Yield (name, model, task) for every head of the kinds in `batches`, with its default options."""
    from allinone_ds.model import AllInOneModel
    from allinone_ds.models.backbone import BackboneConfig, build_backbone
    from allinone_ds.tasks import TASKS, build_task

    for kind, (classes, batch) in batches.items():
        side = tuple(batch["pixel_values"].shape[-2:])
        for head in TASKS[kind].HEADS:
            torch.manual_seed(0)
            sizes = {"hidden_size": run.pick(384, 64), "num_hidden_layers": 4, "num_attention_heads": 2,
                     "patch_size": 16, "image_size": side[0]}  # fmt: skip
            backbone = build_backbone(BackboneConfig(config=sizes))
            options = {"num_queries": run.pick(100, 8)} if head in ("rf_detr", "mask2former") else {}
            task = build_task(kind, "task", classes, backbone, side, head, options)
            yield f"{kind} {head}", AllInOneModel(backbone, {"task": task}).to(run.device), HeadTask("task", batch)


def compared(model: Any, task: HeadTask, device: str) -> dict[str, Any]:
    """Return loss and gradient of the backbone in bf16, relative to those in float32 with the same rounded weights."""
    torch.set_float32_matmul_precision("highest")
    found = []
    model.to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        model.zero_grad()
        torch.manual_seed(0)  # some heads draw points
        loss = model(task=task.name, **task.batch(device)).loss
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.backbone.parameters() if p.grad is not None])
        found.append((float(loss), gradient))
    (low, low_gradient), (high, high_gradient) = found
    cosine = torch.nn.functional.cosine_similarity(low_gradient, high_gradient, dim=0)
    return {"loss": high, "loss_bf16": low, "gradient_cosine": float(cosine), "passed": float(cosine) > LEAST_COSINE,
            "gradient_ratio": float(low_gradient.norm() / high_gradient.norm())}  # fmt: skip


def demo(run: Run) -> dict[str, Any]:
    """Return what `allinone-ds demo` ends with after a few steps."""
    steps = run.pick("60", "4")
    shutil.rmtree(run.folder / "demo", ignore_errors=True)  # of an earlier call
    command = [sys.executable, "-m", "allinone_ds.cli", "demo", "--steps", steps, "--output", str(run.folder / "demo")]
    status, output, errors = run_command(command, run.left() - 5)
    file = run.folder / "demo" / "metrics.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {"head": "demo", "status": status, "steps": found.get("steps"), "score": found.get("eval_score"),
            "seconds": found.get("train_runtime"), "end": (output + errors)[-500:] if status else ""}  # fmt: skip
