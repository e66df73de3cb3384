"""The shared backbone: a plain ViT of `transformers` with an optional convolutional stem."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    Dinov2Backbone,
    Dinov2WithRegistersBackbone,
    DINOv3ViTBackbone,
    PreTrainedConfig,
    VitDetBackbone,
)
from transformers.modeling_outputs import BackboneOutput

from allinone_ds.errors import ConfigError
from allinone_ds.models.pretrained import LoadedWeights, load_pretrained
from allinone_ds.models.pyramid import group_norm
from allinone_ds.strict import Strict, did_you_mean

# AutoBackbone.from_pretrained accepts hub names only; these classes also accept folders.
_CLASSES: dict[str, Any] = {
    "dinov2": Dinov2Backbone,
    "dinov2_with_registers": Dinov2WithRegistersBackbone,
    "dinov3_vit": DINOv3ViTBackbone,
    "vitdet": VitDetBackbone,
}
_RUN_FILE = "model.json"  # in the folder of a run, and in no folder of `transformers`
# The submodule of each model that turns pixels into tokens.
_PATCH_PROJECTION = {
    "dinov2": "embeddings.patch_embeddings.projection",
    "dinov2_with_registers": "embeddings.patch_embeddings.projection",
    "dinov3_vit": "embeddings.patch_embeddings",
    "vitdet": "embeddings.projection",
}
# Architecture and sizes of ViTs with a name; Meta's are those of their published configurations.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    # DINOv3's ViT-L/16: 0.30 G parameters, rotary positions (any image size)
    "vit_l": ("dinov3_vit", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                             "intermediate_size": 4096, "num_register_tokens": 4}),
    # ViT-g/14 of https://arxiv.org/abs/2106.04560 with rotary positions: 1.01 G parameters
    "vit_g": ("dinov3_vit", {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16,
                             "intermediate_size": 6144, "patch_size": 14, "num_register_tokens": 4}),
    # https://arxiv.org/abs/2304.07193: 1.14 G parameters
    "dinov2_g": ("dinov2", {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
                            "use_swiglu_ffn": True, "patch_size": 14, "image_size": 518}),
    # https://arxiv.org/abs/2508.10104: 6.72 G parameters
    "dinov3_7b": ("dinov3_vit", {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
                                 "intermediate_size": 8192, "use_gated_mlp": True, "hidden_act": "silu",
                                 "query_bias": False, "value_bias": False, "num_register_tokens": 4}),
}  # fmt: skip


class BackboneConfig(Strict):
    """Architecture, size, initial weights and output layers of the backbone.

    Example:
        >>> BackboneConfig(name="vit_l").config["hidden_size"]
        1024
        >>> BackboneConfig(model_type="vitdet", config={"hidden_size": 192}).stem
        'patch'
    """

    name: str | None = None
    """Name of a large ViT, a key of `NAMED`. Validation fills `model_type` and `config` and resets it to None."""
    model_type: Literal["dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet"] = "dinov2"
    """Architecture: a `model_type` of `transformers`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that model's configuration class (hidden_size, num_hidden_layers, patch_size, drop_path_rate, ...)."""
    checkpoint: str | None = None
    """Folder or hub name of pretrained weights; None initialises the weights randomly."""
    min_loaded: float = Field(0.9, ge=0, le=1)
    """Smallest fraction of the backbone's tensors that `checkpoint` must contain; with fewer the run does not start."""
    out_indices: list[int] | None = None
    """Layers whose outputs the heads receive, 1 = first layer; None: four at even distances, the last one included."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: by one strided convolution, or by 3x3 convolutions of the same total stride."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name") is None:
            return data
        if data["name"] not in NAMED:
            raise ValueError(f"unknown name '{data['name']}'; {did_you_mean(str(data['name']), NAMED)}")
        model_type, sizes = NAMED[data["name"]]
        if data.get("model_type", model_type) != model_type:
            raise ValueError(
                f"'{data['name']}' is a '{model_type}', but model_type is '{data['model_type']}'; remove model_type"
            )
        return {**data, "name": None, "model_type": model_type, "config": {**sizes, **(data.get("config") or {})}}


class ConvStem(nn.Module):
    """3x3 convolutions of total stride `stride` instead of one patch projection (https://arxiv.org/abs/2106.14881).

    With it, tiny ViTs learn from scratch in minutes; with a patch projection they need hours.

    Args:
        in_channels: channels of the image.
        hidden_size: channels of a token.
        stride: patch size in pixels.
    """

    def __init__(self, in_channels: int, hidden_size: int, stride: int) -> None:
        super().__init__()
        strides = _factors(stride)
        layers: list[nn.Module] = []
        width = in_channels
        for i, step in enumerate(strides):
            out = max(hidden_size // 2 ** (len(strides) - 1 - i), 16)
            kernel, padding = (3, 1) if step <= 2 else (step, 0)
            layers.append(nn.Conv2d(width, out, kernel, stride=step, padding=padding, bias=False))
            layers += [group_norm(out), nn.GELU()]
            width = out
        self.layers = nn.Sequential(*layers)
        self.projection = nn.Conv2d(width, hidden_size, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if module is not self.projection else "fan_in")
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """Weight whose dtype `transformers` reads to cast the pixels."""
        return self.projection.weight

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.layers(pixel_values))  # (B, C, H / stride, W / stride)


class Backbone(nn.Module):
    """A ViT of `transformers` that returns feature maps, with the sizes that heads need.

    Args:
        net: a backbone model of `transformers`.
        loaded: which of its tensors came from a checkpoint; None without one.

    Attributes:
        channels: channels C of every feature map.
        stride: pixels per cell of the feature maps.
        num_levels: number of feature maps, all of the same resolution.
        config: configuration of the ViT.
    """

    def __init__(self, net: Any, loaded: LoadedWeights | None = None) -> None:
        super().__init__()
        self.net = net
        self.loaded = loaded
        self.config = net.config
        self.channels: int = self.config.hidden_size
        self.stride: int = _patch_size(self.config)
        self.num_levels: int = len(self.config.out_indices)

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return the feature maps of normalised images.

        Args:
            pixel_values: (B, 3, H, W), any floating dtype; H and W are multiples of the stride.

        Returns:
            `.feature_maps`: a tuple of `num_levels` maps (B, C, H / stride, W / stride).

        Raises:
            ValueError: H or W is no multiple of the stride.
        """
        H, W = pixel_values.shape[-2:]
        if H % self.stride or W % self.stride:
            raise ValueError(
                f"images of {H} x {W} pixels: both sides must be multiples of {self.stride}, the patch size"
            )
        dtype = next(self.net.parameters()).dtype
        return BackboneOutput(feature_maps=self.net(pixel_values.to(dtype)).feature_maps)


def build_backbone(cfg: BackboneConfig) -> Backbone:
    """Build the backbone that `cfg` describes.

    Under ZeRO-3, while an `HfDeepSpeedConfig` exists, its parameters are partitioned as they are created.

    Raises:
        ConfigError: the model's configuration does not have a field of `cfg.config`, or settings contradict each other.

    Example:
        >>>         >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        >>> backbone = build_backbone(BackboneConfig(config=sizes))
        >>> [tuple(level.shape) for level in backbone(torch.randn(1, 3, 32, 48)).feature_maps]
        [(1, 32, 4, 6), (1, 32, 4, 6)]
        >>> backbone.channels, backbone.stride, backbone.num_levels
        (32, 8, 2)
    """
    try:
        net, loaded = _from_checkpoint(cfg, cfg.checkpoint) if cfg.checkpoint else (_from_config(cfg), None)
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        raise ConfigError(f"model.backbone ({cfg.model_type}): {error}") from error
    if cfg.stem == "conv":
        path = _PATCH_PROJECTION[cfg.model_type]
        stem = ConvStem(net.config.num_channels, net.config.hidden_size, _patch_size(net.config))
        net.set_submodule(path, stem.to(next(net.parameters()).dtype))  # under ZeRO-3 the ViT may be bfloat16
    for name, parameter in net.named_parameters():
        if name.endswith("mask_token"):  # only masked pretraining uses it, so it never gets a gradient
            parameter.requires_grad_(False)
    return Backbone(net, loaded)


def _from_config(cfg: BackboneConfig) -> Any:
    default = AutoConfig.for_model(cfg.model_type)
    _check_fields(cfg, default)
    depth = cfg.config.get("num_hidden_layers", default.num_hidden_layers)
    indices = cfg.out_indices or _spread(depth)
    config = AutoConfig.for_model(cfg.model_type, **cfg.config, out_indices=_checked(indices, depth))
    _check_values(config)
    return AutoBackbone.from_config(config)


def _from_checkpoint(cfg: BackboneConfig, checkpoint: str) -> tuple[Any, LoadedWeights]:
    if cfg.stem == "conv":
        raise ConfigError("model.backbone.stem: 'conv' has random weights and would discard the patch projection of "
                          f"the checkpoint {checkpoint}; use 'patch'")  # fmt: skip
    if (Path(checkpoint) / _RUN_FILE).is_file():
        raise ConfigError(f"model.backbone.checkpoint: {checkpoint} is the folder of a run; set model.start_from to it "
                          "instead, which copies its backbone and its heads")  # fmt: skip
    theirs = AutoConfig.from_pretrained(checkpoint)
    if theirs.model_type != cfg.model_type:
        raise ConfigError(f"model.backbone.checkpoint: {checkpoint} is a '{theirs.model_type}', but model_type is "
                          f"'{cfg.model_type}'; change model_type")  # fmt: skip
    _check_fields(cfg, theirs)
    depth = cfg.config.get("num_hidden_layers", theirs.num_hidden_layers)
    indices = _checked(cfg.out_indices or _spread(depth), depth)
    named = ("stage_names", "out_features", "out_indices")  # the configuration derives them from the depth
    kept = {key: value for key, value in theirs.to_dict().items() if key not in named}
    config = type(theirs).from_dict({**kept, **cfg.config}, out_indices=indices)
    _check_values(config)
    changed = {
        key: (getattr(config, key), getattr(theirs, key))
        for key in cfg.config
        if getattr(config, key) != getattr(theirs, key)
    }
    return load_pretrained(_CLASSES[cfg.model_type], checkpoint, config, cfg.min_loaded, changed)


def _check_fields(cfg: BackboneConfig, config: Any) -> None:
    """Raise if `cfg.config` has a key that is no field of the model's own configuration."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    allowed = {f.name for f in dataclasses.fields(config) if not f.name.startswith("_")} - general
    for key in cfg.config:
        if key not in allowed:
            raise ConfigError(f"model.backbone.config: unknown key '{key}' for {cfg.model_type}; "
                              f"{did_you_mean(key, allowed)}")  # fmt: skip


def _check_values(config: Any) -> None:
    """Raise for values that `transformers` accepts, but that make the first forward fail or mean something else."""
    where, width, heads = "model.backbone.config", config.hidden_size, config.num_attention_heads
    if heads < 1 or config.num_hidden_layers < 1 or config.num_channels != 3:
        raise ConfigError(
            f"{where}: num_attention_heads {heads}, num_hidden_layers {config.num_hidden_layers}, num_channels "
            f"{config.num_channels}; allowed are at least 1, at least 1, and 3 (RGB)"
        )
    if not getattr(config, "reshape_hidden_states", True):
        raise ConfigError(f"{where}.reshape_hidden_states: must be true because heads need maps; remove it")
    rotary = config.model_type == "dinov3_vit"  # rotary positions need a multiple of 4 channels per head
    if width % (heads * (4 if rotary else 1)):
        rotary_rule = ", with a multiple of 4 channels per head" if rotary else ""
        raise ConfigError(
            f"{where}: hidden_size {width} must be a multiple of num_attention_heads ({heads}){rotary_rule}"
        )
    if not 0 <= config.drop_path_rate < 1:
        raise ConfigError(f"{where}.drop_path_rate = {config.drop_path_rate}; allowed: at least 0 and below 1")


def _spread(depth: int) -> list[int]:
    """Return up to four layer numbers at even distances, the last layer included."""
    return sorted({round(depth * k / 4) for k in (1, 2, 3, 4)} - {0})


def _checked(indices: list[int], depth: int) -> list[int]:
    if sorted(set(indices)) != list(indices) or not all(0 <= i <= depth for i in indices):
        raise ConfigError(f"model.backbone.out_indices = {indices}; give increasing layer numbers from 1 to {depth}")
    return indices


def _patch_size(config: Any) -> int:
    size = config.patch_size
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ConfigError(
            f"model.backbone.config.patch_size = {size}; only square patches are supported, give one number"
        )
    return size[0]


def _factors(stride: int) -> list[int]:
    """Return `stride` as factors of two and the remaining factor: 16 -> [2, 2, 2, 2], 14 -> [2, 7]."""
    factors = []
    while stride % 2 == 0:
        factors.append(2)
        stride //= 2
    return factors + [stride] if stride > 1 or not factors else factors
