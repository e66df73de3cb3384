"""Parameter groups: one component (backbone or one head), one weight decay and one learning rate each."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from allinone_ds.zero.params import whole_shape

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
            shape = whole_shape(parameter)
            full = f"{prefix}.{name}" if prefix else name
            if whole or len(shape) <= 1 or name.endswith("bias") or any(token in name for token in TOKENS):
                names.add(full)
    return names


def backbone_layer(name: str, depth: int) -> int:
    """Layer of a backbone parameter: 0 embeddings, 1 to `depth` the transformer layers, `depth` + 1 what follows.

    Args:
        name: of the parameter, for example "backbone.net.layer.3.norm1.weight" (layer 4).
        depth: how many transformer layers there are.
    """
    if ".embeddings." in name:  # before numbers are looked at: a convolutional stem has layers of its own
        return 0
    found = re.search(r"\.layer\.(\d+)\.", name)
    return int(found[1]) + 1 if found else depth + 1


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_factor: float,
    layer_lr_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of an AllInOneModel.

    Every group is wholly backbone or wholly one head, because ZeRO cuts its shards along groups.

    With layer-wise decay d, layer i of a backbone of L layers learns with d ** (L + 1 - i) times the backbone's rate:
    what follows the last layer with all of it, the embeddings (i = 0) with the least (BEiT,
    https://arxiv.org/abs/2106.08254).

    Args:
        model: has `backbone` and `tasks`.
        learning_rate: of the heads.
        weight_decay: of matrices and kernels.
        backbone_lr_factor: learning rate of the backbone divided by that of the heads.
        layer_lr_decay: learning rate of a backbone layer divided by that of the layer above it; 1: all alike.

    Returns:
        Groups with `name` ("head/NAME/decay", "backbone/no_decay", or "backbone/layer03/decay" with layer-wise decay),
        `params`, `lr` and `weight_decay`; heads first, so the learning rate that Trainer logs, which is the first
        group's, is the one that was configured.

    Raises:
        ValueError: a trainable parameter belongs to neither backbone nor task, or to two of them.
    """
    exempt = without_decay(model)
    backbone: Any = model.backbone
    depth = backbone.config.num_hidden_layers if layer_lr_decay != 1.0 else 0
    groups: dict[str, dict[str, Any]] = {}
    owner: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if parts[0] == "backbone":
            component, lr = "backbone", learning_rate * backbone_lr_factor
            if layer_lr_decay != 1.0:
                layer = backbone_layer(name, depth)
                component, lr = f"backbone/layer{layer:02}", lr * layer_lr_decay ** (depth + 1 - layer)
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
