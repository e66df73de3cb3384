"""Weights of a run or of a checkpoint as one state dict on the CPU, from safetensors or from ZeRO shards."""

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
    """Weights of a run or of one of its checkpoints, in float32 on the CPU.

    A checkpoint may hold them twice: in model.safetensors (in the dtype that was trained in) and in its ZeRO shards,
    whose masters are float32 whatever was trained in. A run without final weights gives those of its last checkpoint.

    Args:
        folder: of a run or of a checkpoint, ZeRO stage 1, 2 or 3 of any number of ranks.
        prefer_shards: take the shards where a folder has both.

    Returns:
        The state dict, and the file or folder that it was read from.

    Raises:
        ConfigError: there are no weights, or the shards cannot be put together.
    """
    for place in [Path(folder), *reversed(checkpoints(folder))]:
        file, shards = place / WEIGHTS_FILE, shards_of(place)
        if shards is not None and (prefer_shards or not file.is_file()):
            return _from_shards(shards), shards
        if file.is_file():
            return {name: _full(value) for name, value in load_file(file).items()}, file
    raise ConfigError(f"{folder}: neither {WEIGHTS_FILE} nor ZeRO shards in it or in its checkpoints")


def shards_of(checkpoint: Path) -> Path | None:
    """The folder of ZeRO shards that a checkpoint's file `latest` names; None when there is none."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return None
    shards = checkpoint / latest.read_text().strip()
    return shards if any(shards.glob("*_optim_states.pt")) else None


def _from_shards(shards: Path) -> dict[str, Tensor]:
    from allinone_ds.zero.checkpoint.consolidate import consolidate

    try:
        return {name: _full(value) for name, value in consolidate(shards).items()}
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{shards}: its ZeRO shards cannot be put together: {error}") from error


def _full(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value
