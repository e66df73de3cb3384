"""What `trainer.optim` stands for beside the optimizers of transformers: `auto` and `muon`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from allinone_ds.errors import ConfigError
from allinone_ds.strict import did_you_mean

MUON = "muon"
"""Value of `trainer.optim` for DeepSpeed's Muon, which transformers does not know."""
NS_METHODS = ("gram", "standard")


def fits_muon(name: str, shape: Sequence[int]) -> bool:
    """Return whether Muon may train a parameter of the backbone: a matrix of a layer, no embedding or adapter.

    Args:
        name: of the parameter.
        shape: of the whole parameter.

    Example:
        >>> fits_muon("backbone.net.layer.0.mlp.fc1.weight", (64, 32)), fits_muon("backbone.net.cls_token", (1, 1, 32))
        (True, False)
    """
    return len(shape) == 2 and "embed" not in name and "lora_" not in name


def default_optim(use_cpu: bool, deepspeed: Any) -> str:
    """Return what the optimizer "auto" stands for.

    Args:
        use_cpu: whether the model is on the CPU.
        deepspeed: content of the DeepSpeed config, valid or not.

    Example:
        >>> default_optim(False, {"zero_optimization": {"stage": 2}})
        'adamw_torch_fused'
    """
    return "adamw_torch" if use_cpu or _offloads(deepspeed) else "adamw_torch_fused"


@dataclass(frozen=True)
class MuonSettings:
    """Settings of Muon, from `trainer.optim_args`, such as "muon_lr=0.01,momentum=0.95".

    Args:
        muon_lr: learning rate of Muon in the place of `trainer.learning_rate`; None: the same.
        momentum: of Muon, from 0 to below 1.
        ns_method: Newton-Schulz iteration, "gram" (in fp16 on a GPU) or "standard" (in bf16).

    Raises:
        ConfigError: a value out of its range.
    """

    muon_lr: float | None = None
    momentum: float = 0.95
    ns_method: str = "gram"

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.muon_lr is not None and not self.muon_lr > 0, f"muon_lr = {self.muon_lr}: must be above 0"),
            (not 0 <= self.momentum < 1, f"momentum = {self.momentum}: must be from 0 to below 1"),
            (self.ns_method not in NS_METHODS, f"ns_method: {did_you_mean(self.ns_method, NS_METHODS)}"),
        ):
            if wrong:
                raise ConfigError(f"trainer.optim_args with optim 'muon': {message}")

    @classmethod
    def parse(cls, text: str | None) -> MuonSettings:
        """Read `trainer.optim_args`.

        Args:
            text: settings as "name=value,name=value"; None: none.

        Raises:
            ConfigError: an unknown name, or a value that is no number or out of its range.

        Example:
            >>> MuonSettings.parse("muon_lr=0.01, ns_method=standard")
            MuonSettings(muon_lr=0.01, momentum=0.95, ns_method='standard')
        """
        names = [field.name for field in fields(cls)]
        given: dict[str, Any] = {}
        for part in filter(None, (text or "").replace(" ", "").split(",")):
            name, _, value = part.partition("=")
            if name not in names:
                raise ConfigError(f"trainer.optim_args = {text!r} with optim 'muon': {did_you_mean(name, names)}")
            try:
                given[name] = value if name == "ns_method" else float(value)
            except ValueError:
                raise ConfigError(f"trainer.optim_args = {text!r}: {name} must be a number") from None
        return cls(**given)


def muon_mistakes(deepspeed: Any, optim_args: str | None) -> list[str]:
    """Return what does not go with `trainer.optim: muon`; switch off `reduce_scatter` on ZeRO-3, as DeepSpeed requires.

    Args:
        deepspeed: content of the DeepSpeed config, changed in place.
        optim_args: `trainer.optim_args`.
    """
    mistakes = []
    try:
        MuonSettings.parse(optim_args)
    except ConfigError as error:
        mistakes.append(str(error))
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    if not isinstance(zero, dict):
        return mistakes
    if _offloads(deepspeed):
        mistakes.append(
            "trainer.optim = 'muon' with deepspeed.zero_optimization.offload_optimizer: Muon on the CPU cannot be "
            "balanced; remove one of the two"
        )
    if zero.get("stage") == 3 and zero.setdefault("reduce_scatter", False) is not False:
        mistakes.append(
            "trainer.optim = 'muon' with deepspeed.zero_optimization.reduce_scatter: DeepSpeed's Muon needs false on "
            "ZeRO-3; remove the key"
        )
    return mistakes


def _offloads(deepspeed: Any) -> bool:
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    return isinstance(zero, Mapping) and bool(zero.get("offload_optimizer") or zero.get("cpu_offload"))
