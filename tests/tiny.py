"""Tiny backbones, tasks and samples for the tests."""

from __future__ import annotations

import torch
from torchvision import tv_tensors

from allinone_ds.model import AllInOneModel
from allinone_ds.models.backbone import Backbone, BackboneConfig, build_backbone
from allinone_ds.tasks import build_task

SIZE = (32, 32)
CLASSES = ["circle", "square", "cross"]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 32,
}
TYPES = {"det": "detection", "seg": "segmentation", "cls": "classification"}
LIGHT = {
    "det": ("fcos", {"width": 32, "num_convs": 1}),
    "seg": ("light", {"width": 32}),
    "cls": ("linear", {}),
}


def tiny_backbone(model_type: str = "dinov2", stem: str = "conv", **config: object) -> Backbone:
    fields = dict(TINY, **config)
    if model_type == "dinov3_vit":
        fields["intermediate_size"] = 64
    if model_type == "vitdet":
        fields["pretrain_image_size"] = 32
    return build_backbone(BackboneConfig(model_type=model_type, stem=stem, config=fields))  # type: ignore[arg-type]


def tiny_model(heads: dict[str, tuple[str, dict]] | None = None, **backbone: object) -> AllInOneModel:
    torch.manual_seed(0)
    trunk = tiny_backbone(**backbone)  # type: ignore[arg-type]
    heads = heads or LIGHT
    tasks = {
        name: build_task(TYPES[name], name, CLASSES, trunk, SIZE, head, options)
        for name, (head, options) in heads.items()
    }
    return AllInOneModel(trunk, tasks)


def samples(count: int = 4, boxes: bool = True) -> list[dict]:
    """Bright rectangles of one class each on dark noise: targets of all three tasks in one sample."""
    generator = torch.Generator().manual_seed(1)
    colors = torch.tensor([[250, 60, 60], [60, 250, 60], [60, 60, 250]], dtype=torch.uint8)
    made = []
    for i in range(count):
        image = torch.randint(0, 40, (3, *SIZE), generator=generator, dtype=torch.uint8)
        mask = torch.zeros(SIZE, dtype=torch.uint8)
        label = i % 3
        x, y = (int(v) for v in torch.randint(2, 14, (2,), generator=generator))
        image[:, y : y + 14, x : x + 12] = colors[label][:, None, None]
        mask[y : y + 14, x : x + 12] = label
        mask[:2] = 255
        box = torch.tensor([[x, y, x + 12, y + 14]], dtype=torch.float32)
        if not boxes:
            box = box[:0]
        made.append(
            {
                "image": tv_tensors.Image(image),
                "path": f"{i}.png",
                "index": i,
                "boxes": tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=SIZE),
                "labels": torch.full((len(box),), label),
                "iscrowd": torch.zeros(len(box), dtype=torch.bool),
                "mask": tv_tensors.Mask(mask),
                "label": label,
            }
        )
    return made
