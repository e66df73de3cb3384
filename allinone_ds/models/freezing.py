"""Freeze a part of the backbone: its embeddings, its first layers, or all of it."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone

Freeze = NonNegativeInt | Literal["embeddings", "backbone"]
"""What is frozen: "embeddings", N (the embeddings and the first N layers), or "backbone" (all of it)."""


def freeze_backbone(backbone: Backbone, freeze: Freeze | None) -> None:
    """Exclude a part of the backbone from training.

    Args:
        backbone: what `build_backbone` returned.
        freeze: the part; None: nothing.

    Raises:
        ConfigError: the backbone has fewer layers.
    """
    if freeze is None:
        return
    if freeze == "backbone":
        backbone.requires_grad_(False)
        return
    if isinstance(freeze, int) and freeze > backbone.depth:
        raise ConfigError(
            f"model.freeze = {freeze}: the backbone has {backbone.depth} layers; give at most {backbone.depth}, or "
            "'backbone' to freeze all of it"
        )
    last = 0 if freeze == "embeddings" else freeze
    numbers = backbone.layer_numbers()
    for name, parameter in backbone.named_parameters():
        if numbers[name] <= last:
            parameter.requires_grad_(False)
