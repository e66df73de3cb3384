"""Freeze a part of the backbone: its embeddings, its first layers, or all of it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import NonNegativeInt
from torch import nn

from allinone_ds.errors import ConfigError

Freeze = NonNegativeInt | Literal["embeddings", "backbone"]
"""What is frozen: "embeddings", N (the embeddings and the first N layers), or "backbone" (all of it)."""


def backbone_layer(name: str, depth: int) -> int:
    """Return the layer of a backbone parameter: 0 embeddings, 1 to `depth` transformer layers, `depth` + 1 the rest.

    Args:
        name: name of the parameter.
        depth: number of transformer layers.

    Example:
        >>> backbone_layer("backbone.net.layer.3.norm1.weight", depth=12)
        4
    """
    if ".embeddings." in name:  # checked first: a convolutional stem has numbered layers too
        return 0
    found = re.search(r"\.layer\.(\d+)\.", name)
    return int(found[1]) + 1 if found else depth + 1


def freeze_backbone(backbone: nn.Module, freeze: Freeze | None) -> None:
    """Exclude a part of the backbone from training.

    Args:
        backbone: what `build_backbone` returned.
        freeze: the part; None: nothing.

    Raises:
        ConfigError: the backbone has fewer layers.
    """
    if freeze is None:
        return
    config: Any = backbone.config
    depth = config.num_hidden_layers
    last = {"embeddings": 0, "backbone": depth + 1}[freeze] if isinstance(freeze, str) else freeze
    if isinstance(freeze, int) and freeze > depth:
        raise ConfigError(
            f"model.freeze = {freeze}: the backbone has {depth} layers; give at most {depth}, or 'backbone' to freeze "
            "all of it"
        )
    for name, parameter in backbone.named_parameters():
        if backbone_layer(f".{name}", depth) <= last:
            parameter.requires_grad_(False)
