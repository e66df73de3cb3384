"""Small sizes of every architecture that a backbone can have."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
STAGES = {"depths": [1, 1, 2, 1]}
WINDOWS = {"embed_dim": 16, "num_heads": [1, 2, 2, 2], "window_size": 4, "drop_path_rate": 0.0, **STAGES}
CONVOLUTIONS = {"hidden_sizes": [8, 16, 24, 32], **STAGES}
VITS: dict[str, dict[str, Any]] = {
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "dinov3_vit": {**VIT, "intermediate_size": 64},
    "vit": {**VIT, "intermediate_size": 64},
    "deit": {**VIT, "intermediate_size": 64},
    "vit_mae": {**VIT, "intermediate_size": 64},
    "beit": {**VIT, "intermediate_size": 64, "use_relative_position_bias": True},
    "vitdet": {**VIT, "pretrain_image_size": 64},
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "convnext": CONVOLUTIONS,
    "convnextv2": CONVOLUTIONS,
    "dinov3_convnext": CONVOLUTIONS,
    "hiera": {"embed_dim": 16, "num_heads": [1, 2, 2, 2], "image_size": [64, 64], **STAGES},
}
NETS = {**VITS, **HIERARCHICAL}
TIMM = {"convnext_atto": {}, "resnet10t": {"freeze_batch_norm_2d": True}}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs the extra `timm`")


def settings(name: str) -> dict[str, Any]:
    """Return the fields of BackboneConfig of a small net, by `model_type` or name of timm."""
    if name in TIMM:
        return {"name": f"timm/{name}", "config": TIMM[name]}
    return {"model_type": name, "config": NETS[name]}


every_net = [*NETS, *(pytest.param(name, marks=needs_timm) for name in TIMM)]
