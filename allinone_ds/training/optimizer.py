"""Parameter groups: one component (backbone or one head) and one weight decay each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
TOKENS = ("cls_token", "mask_token", "register_tokens", "position_embedding", "pos_embed", "query")


def without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: norms, biases, embeddings, vectors.

    Args:
        model: any module; under ZeRO-3 its parameters may be partitioned.
    """
    names = set()
    for prefix, module in model.named_modules():
        whole = isinstance(module, (*NORMS, nn.Embedding)) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # a partitioned parameter is flat and empty
            full = f"{prefix}.{name}" if prefix else name
            if whole or len(shape) <= 1 or name.endswith("bias") or any(token in name for token in TOKENS):
                names.add(full)
    return names


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_lr_factor: float
) -> list[dict[str, Any]]:
    """Optimizer groups of an AllInOneModel.

    Every group is wholly backbone or wholly one head, because ZeRO cuts its shards along groups.

    Args:
        model: has `backbone` and `tasks`.
        learning_rate: of the heads.
        weight_decay: of matrices and kernels.
        backbone_lr_factor: learning rate of the backbone divided by that of the heads.

    Returns:
        Groups with `name` ("head/NAME/decay", "backbone/no_decay", ...), `params`, `lr` and `weight_decay`; heads
        first, so the learning rate that Trainer logs, which is the first group's, is the one that was configured.

    Raises:
        ValueError: a trainable parameter belongs to neither backbone nor task, or to two of them.
    """
    exempt = without_decay(model)
    groups: dict[str, dict[str, Any]] = {}
    owner: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if parts[0] == "backbone":
            component, lr = "backbone", learning_rate * backbone_lr_factor
        elif parts[0] == "tasks" and len(parts) > 2:
            component, lr = f"head/{parts[1]}", learning_rate
        else:
            raise ValueError(f"parameter '{name}' is neither in model.backbone nor in model.tasks")
        if parameter in owner:
            if owner[parameter] != component:
                raise ValueError(f"parameter '{name}' is shared by {owner[parameter]} and {component}")
            continue
        owner[parameter] = component
        key = f"{component}/{'no_decay' if name in exempt else 'decay'}"
        decay = 0.0 if name in exempt else weight_decay
        group = groups.setdefault(key, {"name": key, "params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"].startswith("backbone"))
