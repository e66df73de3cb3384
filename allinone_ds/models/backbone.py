"""The shared backbone: a model of `transformers` or timm, a plain ViT with an optional convolutional stem."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput

from allinone_ds.errors import ConfigError
from allinone_ds.models import architectures
from allinone_ds.models.architectures import ARCHITECTURES, ModelType
from allinone_ds.models.pretrained import LoadedWeights, checkpoint_config, load_pretrained
from allinone_ds.models.pyramid import group_norm
from allinone_ds.strict import PathText, Strict, did_you_mean

_RUN_FILE = "model.json"  # in the folder of a run, and in no folder of `transformers`
# Architecture and sizes of backbones with a name, those of their published configurations.
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
    # https://arxiv.org/abs/2010.11929
    "vit_b": ("vit", {}),
    # distilled, https://arxiv.org/abs/2012.12877
    "deit_b": ("deit", {}),
    # https://arxiv.org/abs/2106.08254
    "beit_b": ("beit", {"use_relative_position_bias": True, "drop_path_rate": 0.0}),
    # https://arxiv.org/abs/2111.06377
    "mae_b": ("vit_mae", {}),
    # https://arxiv.org/abs/2103.14030
    "swin_t": ("swin", {"drop_path_rate": 0.0}),
    "swin_b": ("swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.0}),
    # https://arxiv.org/abs/2201.03545
    "convnext_t": ("convnext", {}),
    "convnext_b": ("convnext", {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}),
    # https://arxiv.org/abs/2306.00989
    "hiera_t": ("hiera", {"depths": [1, 2, 7, 2]}),
    "hiera_b": ("hiera", {}),
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
    """A key of `NAMED`, "timm/" and the name of a timm model, or a folder of `transformers` (as `checkpoint`). Nothing
    is downloaded. Validation fills `model_type`, `config` and `checkpoint` and resets it to None."""
    model_type: ModelType = "dinov2"
    """Architecture: a `model_type` of `transformers`; by default that of the folder `checkpoint`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that model's configuration class (hidden_size, num_hidden_layers, patch_size, drop_path_rate, ...)."""
    checkpoint: PathText | None = None
    """Folder or hub name of pretrained weights; None initialises the weights randomly."""
    min_loaded: float = Field(0.9, ge=0, le=1)
    """Smallest fraction of the backbone's tensors that `checkpoint` must contain; with fewer the run does not start."""
    out_indices: list[int] | None = None
    """Layers, or stages of a hierarchical backbone, whose outputs the heads receive, 1 = first; None: four layers at
    even distances, the last one included, or all stages."""
    stride: PositiveInt | None = None
    """Hierarchical backbones: pixels per cell of the one map that the heads receive, which holds all stages; None: 16,
    or the nearest that the stages have."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: by one strided convolution, or by 3x3 convolutions of the same total stride."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name, checkpoint = data.get("name"), data.get("checkpoint")
        if name is None:
            theirs = None if checkpoint is None or "model_type" in data else _model_type_of(checkpoint)
            return data if theirs is None else {**data, "model_type": theirs}
        if str(name).startswith("timm/"):
            model_type, sizes = "timm_backbone", {"backbone": str(name).removeprefix("timm/")}
        elif name in NAMED:
            model_type, sizes = NAMED[name]
        elif (theirs := _model_type_of(name)) is not None:
            if checkpoint is not None:
                raise ValueError(f"name '{name}' is a folder, and checkpoint is '{checkpoint}'; give one of them")
            model_type, sizes, checkpoint = theirs, {}, str(name)
        else:
            raise ValueError(
                f"unknown name '{name}'; {did_you_mean(str(name), NAMED)}. A folder with a config.json of "
                "transformers and timm/NAME are allowed too; nothing is downloaded"
            )
        if data.get("model_type", model_type) != model_type:
            raise ValueError(
                f"'{name}' is a '{model_type}', but model_type is '{data['model_type']}'; remove model_type"
            )
        settings = {"model_type": model_type, "config": {**sizes, **(data.get("config") or {})}}
        return {**data, "name": None, "checkpoint": checkpoint, **settings}


def _model_type_of(folder: Any) -> str | None:
    """Return the `model_type` of a folder of `transformers`, None if it is none."""
    file = Path(str(folder)).expanduser() / "config.json"
    try:
        return str(json.loads(file.read_text())["model_type"]) if file.is_file() else None
    except (ValueError, KeyError, TypeError):
        return None


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
    """A net of `transformers` that returns feature maps of one resolution, with the sizes that heads need.

    The stages of a hierarchical net have different resolutions and channels. They are averaged or interpolated to
    `stride` and concatenated, so that the heads receive one map with the channels of all stages.

    Args:
        net: a backbone model of `transformers`.
        loaded: which of its tensors came from a checkpoint; None without one.
        stride: pixels per cell of the maps of a hierarchical net; None: 16, or the nearest that its stages have.

    Attributes:
        channels: channels C of every feature map.
        stride: pixels per cell of the feature maps.
        num_levels: number of feature maps, all of the same resolution.
        size_multiple: number of pixels of which both sides of an image are multiples.
        fixed_size: the only (H, W) of images that the net takes; None: all multiples.
        config: configuration of the net.
        settings: what `build_backbone` built it from; None if it was built otherwise.

    Raises:
        ConfigError: `stride` is not the stride of a stage.
    """

    def __init__(self, net: Any, stride: int | None = None, loaded: LoadedWeights | None = None) -> None:
        super().__init__()
        self.net = net
        self.loaded = loaded
        self.config = net.config
        self._levels = architectures.levels_of(net)
        strides = sorted({step for _, step in self._levels})
        self.hierarchical = len(strides) > 1
        if stride is not None and stride not in strides:
            raise ConfigError(
                f"model.backbone.stride = {stride}: the maps of this {self.config.model_type} have "
                f"{', '.join(map(str, strides))} pixels per cell; give one of them"
            )
        self.stride: int = stride or architectures.nearest_stride(strides)
        channels = [count for count, _ in self._levels]
        self.channels: int = sum(channels) if self.hierarchical else channels[0]
        self.num_levels: int = 1 if self.hierarchical else len(channels)
        self.size_multiple: int = max(strides)
        self.fixed_size = architectures.fixed_size(self.config)
        self.settings: BackboneConfig | None = None

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return the feature maps of normalised images.

        Args:
            pixel_values: (B, 3, H, W), any floating dtype; H and W are multiples of `size_multiple`.

        Returns:
            `.feature_maps`: a tuple of `num_levels` maps (B, C, H / stride, W / stride).

        Raises:
            ValueError: the net does not take images of this size.
        """
        H, W = pixel_values.shape[-2:]
        if refusal := self.refuses((H, W)):
            raise ValueError(f"images of {H} x {W} pixels: {refusal}")
        dtype = next(self.net.parameters()).dtype
        maps = architectures.feature_maps(self.net, pixel_values.to(dtype))
        if self.hierarchical:
            resized = [self._at_stride(level, step) for level, (_, step) in zip(maps, self._levels, strict=True)]
            maps = (torch.cat(resized, dim=1),)  # (B, C, H / stride, W / stride)
        return BackboneOutput(feature_maps=maps)  # type: ignore[arg-type]

    def refuses(self, size: tuple[int, int]) -> str | None:
        """Return why the net does not take images of (H, W) pixels, None if it does."""
        if self.fixed_size is not None and tuple(size) != self.fixed_size:
            H, W = self.fixed_size
            return f"this {self.config.model_type} only takes {H} x {W} pixels, the size that it was built for"
        if any(side % self.size_multiple for side in size):
            what = "coarsest stage" if self.hierarchical else "patch size"
            return f"both sides must be multiples of {self.size_multiple}, the backbone's {what}"
        return None

    @property
    def depth(self) -> int:
        """Number of blocks, e.g. transformer layers."""
        return len(architectures.blocks_of(self.net, self.config.model_type))

    def layer_numbers(self) -> dict[str, int]:
        """Return {parameter: layer}: 0 for the embeddings, 1 to `depth` for the blocks, `depth` + 1 for the rest.

        The downsampling between two stages has the number of the block after it.

        Raises:
            ConfigError: the blocks of a timm model are not known.
        """
        numbers = architectures.layer_numbers(self.net, self.config.model_type)
        return {f"net.{name}": number for name, number in numbers.items()}

    def _at_stride(self, level: Tensor, stride: int) -> Tensor:
        if stride < self.stride:
            return F.avg_pool2d(level, self.stride // stride)
        if stride > self.stride:
            return F.interpolate(level, scale_factor=stride // self.stride, mode="bilinear", align_corners=False)
        return level


def build_backbone(cfg: BackboneConfig) -> Backbone:
    """Build the backbone that `cfg` describes.

    Under ZeRO-3, while an `HfDeepSpeedConfig` exists, its parameters are partitioned as they are created.

    Raises:
        ConfigError: the model's configuration does not have a field of `cfg.config`, or settings contradict each other.

    Example:
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
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
    except (ValueError, TypeError, OSError, RuntimeError, StrictDataclassError) as error:
        raise ConfigError(f"model.backbone ({cfg.model_type}): {error}") from error
    if cfg.stem == "conv":
        path = ARCHITECTURES[cfg.model_type].patch
        assert path is not None
        stem = ConvStem(net.config.num_channels, net.config.hidden_size, architectures.square(net.config.patch_size))
        net.set_submodule(path, stem.to(next(net.parameters()).dtype))  # under ZeRO-3 the ViT may be bfloat16
    architectures.prepare(net, f"model.backbone ({cfg.config.get('backbone', cfg.model_type)})")
    backbone = Backbone(net, cfg.stride, loaded)
    backbone.settings = cfg
    return backbone


def _from_config(cfg: BackboneConfig) -> Any:
    _check_fields(cfg, AutoConfig.for_model(cfg.model_type))
    config = AutoConfig.for_model(cfg.model_type, **cfg.config)
    _check_values(config)
    architectures.set_outputs(config, cfg.out_indices)
    return architectures.from_config(config)


def _from_checkpoint(cfg: BackboneConfig, checkpoint: str) -> tuple[Any, LoadedWeights]:
    if cfg.stem == "conv":
        raise ConfigError("model.backbone.stem: 'conv' has random weights and would discard the patch projection of "
                          f"the checkpoint {checkpoint}; use 'patch'")  # fmt: skip
    if (Path(checkpoint) / _RUN_FILE).is_file():
        raise ConfigError(f"model.backbone.checkpoint: {checkpoint} is the folder of a run; set model.start_from to it "
                          "instead, which copies its backbone and its heads")  # fmt: skip
    theirs = checkpoint_config(checkpoint)
    if theirs.model_type != cfg.model_type:
        raise ConfigError(f"model.backbone.checkpoint: {checkpoint} is a '{theirs.model_type}', but model_type is "
                          f"'{cfg.model_type}'; change model_type")  # fmt: skip
    _check_fields(cfg, theirs)
    named = ("stage_names", "out_features", "out_indices")  # the configuration derives them from the depth
    kept = {key: value for key, value in theirs.to_dict().items() if key not in named}
    config = type(theirs).from_dict({**kept, **cfg.config})
    _check_values(config)
    architectures.set_outputs(config, cfg.out_indices)
    if cfg.model_type == "timm_backbone":
        return architectures.timm_from_folder(config, checkpoint)
    changed = {
        key: (getattr(config, key), getattr(theirs, key))
        for key in cfg.config
        if getattr(config, key) != getattr(theirs, key)
    }
    return load_pretrained(ARCHITECTURES[cfg.model_type].net, checkpoint, config, cfg.min_loaded, changed)


def own_fields(config: Any) -> set[str]:
    """Return the fields of a model's own configuration, without those that all models have."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {f.name for f in dataclasses.fields(config) if not f.name.startswith("_")} - general


def _check_fields(cfg: BackboneConfig, config: Any) -> None:
    """Raise for a key of `cfg.config` that is no field of the model's own configuration, and for a wrong stem."""
    if cfg.stem == "conv" and ARCHITECTURES[cfg.model_type].patch is None:
        raise ConfigError(f"model.backbone.stem: 'conv' is for plain ViTs, and a {cfg.model_type} is none; use 'patch'")
    allowed = own_fields(config)
    for key in cfg.config:
        if key not in allowed:
            raise ConfigError(f"model.backbone.config: unknown key '{key}' for {cfg.model_type}; "
                              f"{did_you_mean(key, allowed)}")  # fmt: skip


def _check_values(config: Any) -> None:
    """Raise for values that `transformers` accepts, but that make the first forward fail or mean something else."""
    where = "model.backbone.config"
    if config.num_channels != 3:
        raise ConfigError(f"{where}: num_channels {config.num_channels}; only 3 (RGB) is supported")
    drop_path_rate = getattr(config, "drop_path_rate", 0.0)
    if not 0 <= drop_path_rate < 1:
        raise ConfigError(f"{where}.drop_path_rate = {drop_path_rate}; allowed: at least 0 and below 1")
    if config.model_type == "timm_backbone" and not config.features_only:
        raise ConfigError(f"{where}.features_only: must be true because heads need maps; remove it")
    if architectures.number_of_stages(config) is not None:
        return
    width, heads = config.hidden_size, config.num_attention_heads
    if heads < 1 or config.num_hidden_layers < 1:
        raise ConfigError(
            f"{where}: num_attention_heads {heads}, num_hidden_layers {config.num_hidden_layers}; allowed are at least "
            "1 and at least 1"
        )
    if not getattr(config, "reshape_hidden_states", True):
        raise ConfigError(f"{where}.reshape_hidden_states: must be true because heads need maps; remove it")
    if getattr(config, "add_fpn", False):
        raise ConfigError(f"{where}.add_fpn: must be false because heads have pyramids of their own; remove it")
    if getattr(config, "mask_ratio", 0) not in (0, 0.75):
        raise ConfigError(f"{where}.mask_ratio = {config.mask_ratio}: heads need all tokens, so it is 0; remove it")
    square = config.model_type in (*architectures.MODELS, "beit")
    if square and not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
        raise ConfigError(
            f"{where}: image_size {config.image_size}, patch_size {config.patch_size}; a '{config.model_type}' "
            "interpolates a square grid of positions: give one number for each"
        )
    rotary = config.model_type == "dinov3_vit"  # rotary positions need a multiple of 4 channels per head
    if width % (heads * (4 if rotary else 1)):
        rotary_rule = ", with a multiple of 4 channels per head" if rotary else ""
        raise ConfigError(
            f"{where}: hidden_size {width} must be a multiple of num_attention_heads ({heads}){rotary_rule}"
        )


def _factors(stride: int) -> list[int]:
    """Return `stride` as factors of two and the remaining factor: 16 -> [2, 2, 2, 2], 14 -> [2, 7]."""
    factors = []
    while stride % 2 == 0:
        factors.append(2)
        stride //= 2
    return factors + [stride] if stride > 1 or not factors else factors
