"""The architectures that a backbone can have: their classes, blocks, strides and rules of size."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BeitBackbone,
    ConvNextBackbone,
    ConvNextV2Backbone,
    DeiTModel,
    Dinov2Backbone,
    Dinov2WithRegistersBackbone,
    DINOv3ConvNextBackbone,
    DINOv3ViTBackbone,
    HieraBackbone,
    SwinBackbone,
    Swinv2Backbone,
    TimmBackbone,
    VitDetBackbone,
    ViTMAEModel,
    ViTModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from allinone_ds.errors import ConfigError
from allinone_ds.models.pretrained import LoadedWeights, common_prefix, without_prefix
from allinone_ds.strict import did_you_mean

ModelType = Literal[
    "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "deit", "vit_mae", "beit", "vitdet", "swin", "swinv2",
    "convnext", "convnextv2", "dinov3_convnext", "hiera", "timm_backbone",
]  # fmt: skip
"""Architectures by `model_type` of `transformers`."""


@dataclass(frozen=True)
class Architecture:
    """How the package builds and divides one architecture.

    Attributes:
        net: class that builds and loads it.
        blocks: pattern of the names of its blocks, whose innermost matches count.
        patch: submodule that turns pixels into tokens, for a plain ViT; None: it cannot have a convolutional stem.
    """

    net: Any
    blocks: str
    patch: str | None = None


_LAYERS, _STAGES = r"\blayers?\.\d+$", r"\bstages\.\d+\.layers\.\d+$"
_PATCH = "embeddings.patch_embeddings.projection"
ARCHITECTURES: dict[str, Architecture] = {
    "dinov2": Architecture(Dinov2Backbone, _LAYERS, _PATCH),
    "dinov2_with_registers": Architecture(Dinov2WithRegistersBackbone, _LAYERS, _PATCH),
    "dinov3_vit": Architecture(DINOv3ViTBackbone, _LAYERS, "embeddings.patch_embeddings"),
    "vit": Architecture(ViTModel, _LAYERS, _PATCH),
    "deit": Architecture(DeiTModel, _LAYERS, _PATCH),
    "vit_mae": Architecture(ViTMAEModel, _LAYERS, _PATCH),
    "beit": Architecture(BeitBackbone, _LAYERS, f"beit.{_PATCH}"),
    "vitdet": Architecture(VitDetBackbone, _LAYERS, "embeddings.projection"),
    "swin": Architecture(SwinBackbone, r"\blayers\.\d+\.blocks\.\d+$"),
    "swinv2": Architecture(Swinv2Backbone, r"\blayers\.\d+\.blocks\.\d+$"),
    "convnext": Architecture(ConvNextBackbone, _STAGES),
    "convnextv2": Architecture(ConvNextV2Backbone, _STAGES),
    "dinov3_convnext": Architecture(DINOv3ConvNextBackbone, _STAGES),
    "hiera": Architecture(HieraBackbone, _STAGES),
    # blocks.3, stages_1.blocks.0, blocks.1.0 (EfficientNet), layer1.0 (ResNet), s1.b1 (RegNet)
    "timm_backbone": Architecture(TimmBackbone, r"(?:\b|_)(?:blocks|layer\d+|s\d+)\.b?\d+(?:\.\d+)?$"),
}
assert set(ARCHITECTURES) == set(get_args(ModelType))
MODELS = {"vit": 1, "deit": 2, "vit_mae": 1}
"""Architectures without a backbone class in `transformers`: {model_type: number of tokens before those of patches}"""


def number_of_stages(config: Any) -> int | None:
    """Return the number of stages of a hierarchical architecture, of which each has its own resolution; else None."""
    if config.model_type == "timm_backbone":
        return len(_timm_strides(config.backbone))
    return len(config.depths) if hasattr(config, "depths") else None


def set_outputs(config: Any, chosen: Sequence[int] | None) -> None:
    """Set which layers or stages return the maps that the heads receive.

    Args:
        config: configuration of the net; all other values are set.
        chosen: their numbers, 1 = first; None: all stages with a stride of at least 4, or four layers at even
            distances.

    Raises:
        ConfigError: the chosen numbers do not increase, the net has fewer, or a timm model is unknown.
    """
    timm_model = config.model_type == "timm_backbone"
    stages = number_of_stages(config)
    depth = config.num_hidden_layers if stages is None else stages
    if chosen is None:
        strides = _timm_strides(config.backbone) if timm_model else [4] * depth
        single = stages is None or min(strides) == max(strides) > 4
        chosen = _spread(depth) if single else [number for number, step in enumerate(strides, 1) if step >= 4]
    lowest = 0 if stages is None and config.model_type not in MODELS else 1  # 0: the embeddings
    if sorted(set(chosen)) != list(chosen) or not chosen or not all(lowest <= i <= depth for i in chosen):
        what = "layer" if stages is None else "stage"
        raise ConfigError(
            f"model.backbone.out_indices = {list(chosen)}; give increasing {what} numbers from 1 to {depth}"
        )
    config.out_indices = [index - timm_model for index in chosen]  # timm counts from 0
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # no token is left out


def chosen_indices(config: Any) -> list[int]:
    """Return the numbers of the layers or stages whose maps a built net returns, 1 = first."""
    return [index + (config.model_type == "timm_backbone") for index in config.out_indices]


def levels_of(net: Any) -> list[tuple[int, int]]:
    """Return (channels, stride in pixels) of each map that a net returns."""
    config = net.config
    out_indices = chosen_indices(config)
    match config.model_type:
        case "timm_backbone":
            info = net._backbone.feature_info
            return list(zip(info.channels(), info.reduction(), strict=True))
        case "hiera":
            pooled = [min(index - 1, config.num_query_pool) for index in out_indices]
            strides = [config.patch_stride[0] * config.query_stride[0] ** count for count in pooled]
        case _ if number_of_stages(config) is not None:
            # the stem of DINOv3's ConvNeXt has no setting
            first = 4 if config.model_type == "dinov3_convnext" else square(config.patch_size)
            strides = [first * 2 ** (index - 1) for index in out_indices]
        case _:
            return [(config.hidden_size, square(config.patch_size))] * len(out_indices)
    return list(zip(net.channels, strides, strict=True))


def feature_maps(net: Any, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """Return the maps (B, C, h, w) of a net, each at its own stride.

    Of `MODELS` the position embeddings are interpolated to the size of the images, and every map passes the final
    LayerNorm, as those of `Dinov2Backbone` do.

    Args:
        net: a backbone model.
        pixel_values: (B, 3, H, W) in the dtype of the weights.
    """
    model_type = net.config.model_type
    if model_type not in MODELS:
        maps = tuple(net(pixel_values).feature_maps)
        return tuple(level.permute(0, 3, 1, 2) for level in maps) if _channels_last(net) else maps
    grid = [side // net.config.patch_size for side in pixel_values.shape[-2:]]
    if model_type == "vit_mae":  # it shuffles the tokens by noise; rising noise keeps their order
        order = torch.arange(math.prod(grid), device=pixel_values.device).expand(len(pixel_values), -1)
        hidden = net.embeddings(pixel_values, order, interpolate_pos_encoding=True)[0]  # (B, 1 + N, C)
    else:
        hidden = net.embeddings(pixel_values, interpolate_pos_encoding=True)  # (B, 1 + N, C), of a 'deit' 2 + N
    found = []
    for number, layer in enumerate(net.layers, 1):
        hidden = layer(hidden)
        if number in net.config.out_indices:
            found.append(net.layernorm(hidden)[:, MODELS[model_type] :].transpose(1, 2).unflatten(2, grid).contiguous())
    return tuple(found)


def _channels_last(net: Any) -> bool:
    """Return whether a net's maps are (B, H, W, C), as those of timm's Swin are."""
    if net.config.model_type != "timm_backbone":
        return False
    return str(getattr(net._backbone, "output_fmt", "NCHW")) == "NHWC"  # a class of timm without it gives NCHW


def fixed_size(config: Any) -> tuple[int, int] | None:
    """Return the only (H, W) of images that a net takes, None if it takes several sizes."""
    if config.model_type == "hiera":  # the order of its tokens depends on the size
        return tuple(config.image_size)  # type: ignore[return-value]
    if config.model_type == "timm_backbone":
        published = timm().get_pretrained_cfg(config.backbone)
        if published is not None and published.fixed_input_size:
            return tuple(published.input_size[-2:])
    return None


def blocks_of(net: nn.Module, model_type: str) -> list[str]:
    """Return the names of a net's blocks, in their order."""
    architecture = ARCHITECTURES[model_type]
    matches = [
        name
        for name, _ in net.named_modules()
        if re.search(architecture.blocks, name)
        and not name.startswith(f"{architecture.patch}.")  # a convolutional stem has numbered layers too
    ]
    return [name for name in matches if not any(other.startswith(f"{name}.") for other in matches)]


def layer_numbers(net: nn.Module, model_type: str) -> dict[str, int]:
    """Return {parameter: layer}: 0 for embeddings, k for block k, and one more than the last block for the rest.

    What lies between two blocks (the downsampling between stages) has the number of the second.

    Args:
        net: a backbone model.
        model_type: its architecture.

    Raises:
        ConfigError: the blocks of the net are not known.

    Example:
        >>> from transformers import Dinov2Config
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [2]}
        >>> numbers = layer_numbers(Dinov2Backbone(Dinov2Config(**sizes)), "dinov2")
        >>> [numbers[name] for name in ("embeddings.cls_token", "encoder.layer.1.norm1.bias", "layernorm.bias")]
        [0, 2, 3]
    """
    blocks = blocks_of(net, model_type)
    if not blocks:
        raise ConfigError(
            f"model.backbone: the blocks of this {model_type} are not known; leave trainer.layer_lr_decay at 1 and do "
            "not freeze single blocks, or choose a different architecture"
        )
    numbers: dict[str, int] = {}
    last = 0
    for name, _ in net.named_parameters():
        inside = [number for number, block in enumerate(blocks, 1) if name.startswith(f"{block}.")]
        last = inside[0] if inside else last
        numbers[name] = inside[0] if inside else (last + 1 if last else 0)
    return numbers


def prepare(net: Any, where: str) -> None:
    """Refuse nets with BatchNorm, and remove or switch off the parameters that never get a gradient.

    Raises:
        ConfigError: the net has a BatchNorm.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        raise ConfigError(
            f"{where}: it has BatchNorms, whose statistics would mix the tasks and differ between ranks; with "
            "pretrained weights set model.backbone.config.freeze_batch_norm_2d: true, otherwise choose an architecture "
            "without them"
        )
    if net.config.model_type in MODELS:
        net.pooler = None
    for name, parameter in net.named_parameters():
        # only masked pretraining uses mask tokens; Swin's backbone has a norm per stage instead of the last one, and
        # BEiT's has none
        if name.endswith("mask_token") or name.startswith(("swin.layernorm.", "beit.layernorm.")):
            parameter.requires_grad_(False)


def timm() -> Any:
    """Return the module `timm`.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("model.backbone: timm models need the package timm: pip install 'allinone_ds[timm]'")
    return importlib.import_module("timm")


def from_config(config: Any) -> Any:
    """Build a net with random weights; under ZeRO-3 its parameters are partitioned as they are created."""
    if config.model_type in ("convnext", "convnextv2"):  # their default is a tuple, to which their backbones add a list
        config.hidden_sizes = list(config.hidden_sizes)
    if config.model_type == "timm_backbone":
        # timm initialises its weights itself, and cannot where they are partitioned: transformers would train on
        # whatever was in memory. The net is built in one piece, as heads are, and partitioned with the optimizer.
        return TimmBackbone(config)
    return ARCHITECTURES[config.model_type].net._from_config(config)


def timm_from_folder(config: Any, folder: str) -> tuple[Any, LoadedWeights]:
    """Load a timm model from a folder that `TimmBackbone.save_pretrained` wrote; return it and what was loaded.

    `TimmBackbone.from_pretrained` takes names of timm only, and downloads their weights.

    Args:
        config: its configuration.
        folder: the folder. A prefix that its names share is removed.

    Raises:
        ConfigError: the folder has no weights, or they do not fit.
    """
    net = from_config(config)
    file = Path(folder) / SAFE_WEIGHTS_NAME
    try:
        state = load_file(file)
        prefix = common_prefix(state, set(net.state_dict()))
        found = net.load_state_dict(without_prefix(state, prefix), strict=False)  # further stages are not needed
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{file}: {error}; give a folder that TimmBackbone.save_pretrained wrote") from error
    if found.missing_keys:
        raise ConfigError(
            f"{file}: it lacks {len(found.missing_keys)} of {len(net.state_dict())} tensors ({found.missing_keys[0]}, "
            "...); give a folder that TimmBackbone.save_pretrained wrote with at least these out_indices"
        )
    outside = [name for name in state if not name.startswith(prefix)]
    unexpected = tuple(sorted([*outside, *(prefix + name for name in found.unexpected_keys)]))
    return net, LoadedWeights(folder, len(net.state_dict()), missing=(), unexpected=unexpected, prefix=prefix)


@functools.cache
def _timm_strides(name: str | None) -> list[int]:
    """Return the stride of every map that a timm model can return.

    Raises:
        ConfigError: timm has no such model, or is not installed.
    """
    package = timm()
    if name is None:
        raise ConfigError("model.backbone.config.backbone: give the name of a timm model, e.g. convnext_tiny")
    if not package.is_model(name):
        raise ConfigError(f"model.backbone: timm has no model '{name}'; {did_you_mean(name, package.list_models())}")
    with torch.device("meta"):
        model = package.create_model(name, features_only=True)
    return [level["reduction"] for level in model.feature_info.info]


def square(size: Any) -> int:
    """Return the side of a patch.

    Raises:
        ConfigError: the patch is not square.
    """
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ConfigError(
            f"model.backbone.config.patch_size = {size}; only square patches are supported, give one number"
        )
    return size[0]


def _spread(depth: int) -> list[int]:
    """Return up to four layer numbers at even distances, the last layer included."""
    return sorted({round(depth * k / 4) for k in (1, 2, 3, 4)} - {0})


def nearest_stride(strides: Sequence[int], target: int = 16) -> int:
    """Return the stride nearest to `target` by ratio."""
    return min(strides, key=lambda stride: abs(math.log2(stride / target)))
