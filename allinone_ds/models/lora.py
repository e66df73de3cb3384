"""LoRA (arXiv 2106.09685) on the backbone, through `peft`: the backbone is frozen and small adapters are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file

from allinone_ds.errors import ConfigError
from allinone_ds.models.backbone import Backbone
from allinone_ds.strict import Strict

_BASE = ".base_layer."


class LoraOptions(Strict):
    """Adapters of the backbone. All tasks share them; their gradients are balanced as those of a backbone are.

    Example:
        >>> LoraOptions(rank=4).target_modules
        'all-linear'
    """

    rank: PositiveInt = 8
    """Rank r of the update B A of a weight."""
    alpha: PositiveFloat = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Ends of the names of the modules with adapters, such as [q_proj, v_proj]; "all-linear": all linear layers."""


def add_lora(backbone: Backbone, options: LoraOptions) -> None:
    """Freeze the backbone and add adapters, which change nothing until they are trained.

    Args:
        backbone: what `build_backbone` returned; under ZeRO-3 its parameters may already be partitioned.
        options: size and place of the adapters.

    Raises:
        ConfigError: `peft` is missing, or the backbone has no such modules.

    Example:
        >>> from allinone_ds.models.backbone import BackboneConfig, build_backbone
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        >>> backbone = build_backbone(BackboneConfig(config=sizes))
        >>> add_lora(backbone, LoraOptions(rank=4, target_modules=["q_proj", "v_proj"]))
        >>> sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        1024
    """
    config = _peft_config(options)
    from peft import inject_adapter_in_model

    net: Any = backbone.net
    try:
        inject_adapter_in_model(config, net)
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules = {options.target_modules}: {error}") from error


def _peft_config(options: LoraOptions) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("model.lora: needs the package peft; pip install peft, or the extra 'lora'") from error
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
    )


def save_adapter(backbone: Backbone, options: LoraOptions, folder: Path) -> None:
    """Write the adapters alone, for `peft.PeftModel.from_pretrained` on the backbone that they were trained on.

    Args:
        backbone: a backbone with adapters.
        options: of its adapters.
        folder: folder to write adapter_config.json and adapter_model.safetensors to.
    """
    names = {name: f"base_model.model.{name}" for name, _ in backbone.net.named_parameters() if is_adapter(name)}
    state = backbone.net.state_dict()
    weights = {key.replace(".default.", "."): state[name].contiguous() for name, key in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _peft_config(options).save_pretrained(str(folder))


def merge_lora(backbone: Backbone) -> None:
    """Add the adapters to the weights that they belong to, so that the backbone has its ordinary modules again."""
    from peft.tuners.lora import LoraLayer

    net: Any = backbone.net
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            net.set_submodule(name, module.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config
    backbone.requires_grad_(True)


def name_without_lora(name: str) -> str:
    """Return the name that a parameter has in a model without adapters.

    Example:
        >>> name_without_lora("net.layer.0.query.base_layer.weight")
        'net.layer.0.query.weight'
    """
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_" in name
