"""Which parameters Muon trains, and which AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from allinone_ds.errors import ConfigError
from allinone_ds.run_config.optimizer_settings import fits_muon
from allinone_ds.zero.params import whole_shape


def groups_for_muon(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups in which Muon trains the matrices of the backbone's layers, and AdamW all others.

    AdamW keeps heads, vectors, embeddings, kernels of convolutions and the matrices of adapters (LoRA).

    Args:
        model: an AllInOneModel.
        groups: its `parameter_groups`.
        lr_factor: learning rate of Muon divided by that of AdamW in the same place.

    Returns:
        Groups with `use_muon`; those of the backbone that are decayed are divided, as "backbone/decay" into
        "backbone/muon" and "backbone/decay".

    Raises:
        ConfigError: the backbone has no such matrix that is trained.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: list[dict[str, Any]] = []
    for group in groups:
        component, _, kind = group["name"].rpartition("/")
        decayed = component.startswith("backbone") and kind == "decay"
        matrices = dict.fromkeys(p for p in group["params"] if decayed and fits_muon(names[p], whole_shape(p)))
        others = [parameter for parameter in group["params"] if parameter not in matrices]
        if matrices:
            lr = group["lr"] * lr_factor
            found.append({**group, "name": f"{component}/muon", "params": list(matrices), "lr": lr, "use_muon": True})
        if others:
            found.append({**group, "params": others, "use_muon": False})
    if not any(group["use_muon"] for group in found):
        raise ConfigError(
            "trainer.optim = 'muon': no matrix of the backbone's layers is trained (it is frozen, adapted or of "
            "convolutions), so Muon would train nothing; use adamw_torch"
        )
    return found
