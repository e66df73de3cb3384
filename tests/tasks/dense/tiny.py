"""Tiny models and samples of the kinds with numbers per pixel."""

from __future__ import annotations

import math

import torch
from torchvision import tv_tensors

from allinone_ds.data.dense_maps import DenseMap, EdgeMap, NormalMap
from allinone_ds.model import AllInOneModel
from allinone_ds.tasks import build_task
from tests.tiny import SIZE, tiny_backbone

LIGHT = {"width": 32}
DPT = {"width": 16, "neck_widths": [16, 16, 16, 16]}
HEADS = {
    "depth": ("depth", "light", LIGHT),
    "depth-l1": ("depth", "light", {**LIGHT, "loss": "l1"}),
    "depth-dpt": ("depth", "dpt", DPT),
    "normals": ("normals", "light", LIGHT),
    "normals-dpt": ("normals", "dpt", DPT),
    "edges": ("edges", "light", {**LIGHT, "upsamples": 2}),
    "edges-plain": ("edges", "light", {**LIGHT, "balanced": False}),
    "saliency": ("saliency", "light", LIGHT),
    "saliency-dpt": ("saliency", "dpt", DPT),
}
KINDS = ("depth", "normals", "edges", "saliency")


def dense_model(heads: dict[str, tuple[str, str, dict]], **backbone: object) -> AllInOneModel:
    """A model with a task per name; (kind, head, options)."""
    torch.manual_seed(0)
    trunk = tiny_backbone(**backbone)  # type: ignore[arg-type]
    return AllInOneModel(
        trunk, {name: build_task(kind, name, [], trunk, SIZE, head, o) for name, (kind, head, o) in heads.items()}
    )


def build(head: str):
    model = dense_model({"map": HEADS[head]})
    return model, model.tasks["map"]


def dense_samples(count: int = 4, values: bool = True, size: tuple[int, int] = SIZE) -> list[dict]:
    """A bright rectangle, nearer and tilted, on dark noise: targets of all four kinds in one sample, 2 rows without."""
    generator = torch.Generator().manual_seed(1)
    H, W = size
    made = []
    for i in range(count):
        image = torch.randint(0, 40, (3, H, W), generator=generator, dtype=torch.uint8)
        y, x = (int(v) for v in torch.randint(3, 10, (2,), generator=generator))
        inside = torch.zeros(H, W, dtype=torch.bool)
        inside[y : y + H // 2, x : x + W // 2] = True
        image[:, inside] = torch.tensor([[250], [60 + 60 * (i % 3)], [60]], dtype=torch.uint8)
        depth = torch.where(inside, 1.0 + i % 2, 4.0)
        tilted, flat = (torch.tensor(vector).view(3, 1, 1) for vector in ([0.6, 0.0, 0.8], [0.0, 0.0, 1.0]))
        normals = torch.where(inside, tilted, flat)
        border = inside.clone()
        border[y + 1 : y + H // 2 - 1, x + 1 : x + W // 2 - 1] = False
        missing = slice(0, 2 if values else H)
        depth[missing], normals[:, missing] = math.nan, math.nan
        edges, saliency = border.to(torch.uint8), inside.to(torch.uint8)
        edges[missing], saliency[missing] = 255, 255
        made.append(
            {
                "image": tv_tensors.Image(image),
                "path": f"{i}.png",
                "index": i,
                "depth": DenseMap(depth),
                "normals": NormalMap(normals),
                "edges": EdgeMap(edges),
                "saliency": tv_tensors.Mask(saliency),
            }
        )
    return made
