"""The heads themselves make a GPU wait for nothing in a micro-step; what libraries do is listed in docs/gpu.md."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors

import allinone_ds
from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import BackboneConfig, build_backbone
from allinone_ds.tasks import build_task
from allinone_ds.zero.engines.loss_scale import loss_scale, scale_changes_after_step

SIDE = 64
PACKAGE = str(Path(allinone_ds.__file__).parent)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "lift_fresh")
"""Operations that end in a wait: values read on the CPU, results of unknown size, tensors made of numbers."""


class Waits(TorchDispatchMode):
    """Counts operations that wait for a device, by the file of the package whose code asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            asks = [file for file in files if file != __file__][-1]  # in a backward: what called the test
            if asks.startswith(PACKAGE):
                self.files[str(Path(asks).relative_to(PACKAGE))] += 1
        return func(*args, **(kwargs or {}))


def samples(kind: str) -> list[dict[str, Any]]:
    image = tv_tensors.Image(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[4.0, 4, 30, 30], [10, 10, 60, 60]], format="XYXY", canvas_size=(SIDE, SIDE))
    targets = {
        "detection": {"boxes": boxes, "labels": torch.tensor([0, 1]), "iscrowd": torch.zeros(2, dtype=torch.bool)},
        "segmentation": {"mask": tv_tensors.Mask((torch.arange(SIDE * SIDE) % 2).view(SIDE, SIDE))},
        "classification": {"label": 1},
    }
    return [{"image": image, "path": "", "index": k, **targets[kind]} for k in range(2)]


@pytest.mark.parametrize(
    ("kind", "head", "options", "own"),
    [
        ("detection", "fcos", {}, {}),
        ("detection", "rf_detr", {"num_queries": 20}, {}),
        ("segmentation", "light", {"class_weights": [1.0, 2.0]}, {}),
        ("segmentation", "upernet", {}, {}),
        ("segmentation", "mask2former", {}, {"models/mask2former.py": 1}),  # sent from page-locked memory
        ("classification", "linear", {"class_weights": [1.0, 2.0]}, {}),
        ("classification", "arcface", {"class_counts": [3, 30]}, {}),
    ],
)
def test_the_code_of_a_head_waits_for_no_device(kind: str, head: str, options: dict, own: dict) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    backbone = build_backbone(BackboneConfig(config=sizes))
    task = build_task(kind, "task", ["a", "b"], backbone, (SIDE, SIDE), head=head, options=options)
    model = AllInOneModel(backbone, {"task": task}).train()
    batch = task.collate(samples(kind))
    model("task", **batch).loss.backward()  # constants are copied once
    with Waits() as waits:
        model("task", **batch).loss.backward()
    assert waits.files == own


def test_the_scale_of_a_grad_scaler_is_used_and_changed_on_the_device() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaler.scale(torch.ones(()))  # which creates the scale
    engine = SimpleNamespace(optimizer=SimpleNamespace(torch_autocast_gradscaler=scaler, overflow=False))
    scales = []
    with Waits() as waits:
        for overflow in (False, False, False, True, True):
            engine.optimizer.overflow = overflow
            with scale_changes_after_step(engine):
                scaler._growth_tracker += 1  # as `update` does
            scales.append(loss_scale(engine))
    assert [float(scale) for scale in scales] == [8.0, 16.0, 16.0, 8.0, 4.0] and not waits.files
    assert scaler.get_growth_interval() == 2 and scaler.state_dict()["_growth_tracker"] == 0
