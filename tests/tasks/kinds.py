"""A small variant of every head for objects and vectors, and samples with the targets of all these kinds."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import Points, corner
from allinone_ds.model import AllInOneModel
from allinone_ds.tasks import build_task
from tests.tasks.heads import HEADS
from tests.tiny import CLASSES, SIZE, samples, tiny_backbone

REGIONS = {"width": 32, "num_convs": 1, "region_convs": 1, "region_size": 7}
CORNERS = ["middle", "left_corner", "right_corner"]
KINDS: dict[str, tuple[str, list[str], str, dict]] = {
    "binary": ("attributes", CLASSES, "binary", {}),
    "numbers": ("regression", ["x", "y"], "numbers", {}),
    "arcface": ("retrieval", CLASSES, "embedding", {"width": 16}),
    "supcon": ("retrieval", CLASSES, "embedding", {"width": 16, "loss": "supcon"}),
    "heatmap": ("keypoints", CLASSES, "heatmap", {**REGIONS, "points": CORNERS}),
    "heatmap-image": ("keypoints", CLASSES[:1], "heatmap", {**REGIONS, "points": CORNERS, "regions": "image"}),
    "fcos_masks": ("instances", CLASSES, "fcos_masks", REGIONS),
    "mask2former": ("instances", CLASSES, "mask2former", HEADS["mask2former"][2]),
}
"""Name of a test -> type of the task, its classes, head and options."""


def kind_samples(count: int = 4, boxes: bool = True, kind: str = "") -> list[dict]:
    """The samples of tests.tiny with one object each, whose corners are points; a number and an attribute are unknown.

    With `heatmap-image`, all objects are of one class.
    """
    made = []
    for i, sample in enumerate(samples(count)):
        x0, y0, x1, y1 = sample["boxes"].as_subclass(Tensor)[0].tolist()
        mask = torch.zeros(1, *SIZE, dtype=torch.uint8)
        mask[0, int(y0) : int(y1), int(x0) : int(x1)] = 1
        points = torch.tensor([[[(x0 + x1) / 2, (y0 + y1) / 2], [x0 + 1, y1 - 1], [x1 - 1, y1 - 1]]])
        n = 1 if boxes else 0
        label = torch.tensor([0 if kind == "heatmap-image" else i % 3])[:n]
        attributes = torch.tensor([float(i % 3 == k) for k in range(3)])
        value = torch.tensor([x0, 1000 + 10 * y0], dtype=torch.float64)
        if i == 1:
            attributes[2], value[0] = float("nan"), float("nan")
        made.append({
            **sample,
            "boxes": tv_tensors.wrap(sample["boxes"].as_subclass(Tensor)[:n], like=sample["boxes"]),
            "labels": label,
            "iscrowd": torch.zeros(n, dtype=torch.bool),
            "masks": tv_tensors.Mask(mask[:n]),
            "keypoints": Points(points[:n], canvas_size=SIZE),
            "visible": torch.tensor([[2, 2, 1 if i else 0]], dtype=torch.uint8)[:n],
            "area": torch.full((n,), 168.0),
            "mirrored": torch.tensor([[0, 2, 1]])[:n],
            "corner": corner(SIZE),
            "attributes": attributes if boxes else torch.full((3,), float("nan")),
            "value": value if boxes else torch.full((2,), float("nan"), dtype=torch.float64),
            "label": i % 3,
        })  # fmt: skip
    return made


def kind_model(*names: str, **backbone: object) -> AllInOneModel:
    """A tiny model with a task for each name."""
    torch.manual_seed(0)
    trunk = tiny_backbone(**backbone)  # type: ignore[arg-type]
    tasks = {}
    for name in names:
        type_name, classes, head, options = KINDS[name]
        tasks[name] = build_task(type_name, name, classes, trunk, SIZE, head, options)
    return AllInOneModel(trunk, tasks)
