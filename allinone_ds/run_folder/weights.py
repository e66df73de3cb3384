"""Load the weights of a run or checkpoint as one state dict on the CPU, from safetensors or from ZeRO shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.names import WEIGHTS_FILE


def read_weights(folder: str | Path, prefer_shards: bool = False) -> tuple[dict[str, Tensor], Path]:
    """Return the weights of a run or of one of its checkpoints, in float32 on the CPU.

    A checkpoint may hold them twice: in model.safetensors, in the dtype of training, and in its ZeRO shards, whose
    master weights are always float32. A run without final weights returns those of its last checkpoint.

    Args:
        folder: folder of a run or checkpoint; its shards may be of ZeRO stage 1, 2 or 3 and any number of ranks.
        prefer_shards: read the shards if a folder has both.

    Returns:
        The state dict, and the file or folder that it was read from.

    Raises:
        ConfigError: the folder has no weights, or its shards cannot be consolidated.
    """
    for place in [Path(folder), *reversed(checkpoints(folder))]:
        file, shards = place / WEIGHTS_FILE, shards_of(place)
        if shards is not None and (prefer_shards or not file.is_file()):
            return _from_shards(shards), shards
        if file.is_file():
            return {name: _float32(value) for name, value in load_file(file).items()}, file
    raise ConfigError(f"{folder}: neither {WEIGHTS_FILE} nor ZeRO shards in the folder or in its checkpoints")


def shards_of(checkpoint: Path) -> Path | None:
    """Return the folder of ZeRO shards that the file `latest` of a checkpoint names; None if there is none."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return None
    shards = checkpoint / latest.read_text().strip()
    return shards if any(shards.glob("*_optim_states.pt")) else None


def _from_shards(shards: Path) -> dict[str, Tensor]:
    from allinone_ds.zero.checkpoint.consolidate import consolidate

    try:
        return {name: _float32(value) for name, value in consolidate(shards).items()}
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{shards}: the ZeRO shards cannot be put together: {error}") from error


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value
