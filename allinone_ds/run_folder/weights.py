"""Load the weights of a run or checkpoint as one state dict on the CPU, from safetensors or from ZeRO shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Set
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from allinone_ds.errors import ConfigError
from allinone_ds.run_folder.checkpoints import checkpoints
from allinone_ds.run_folder.manifest import file_entry
from allinone_ds.run_folder.names import FROZEN_ENTRY, FROZEN_FILE, WEIGHTS_FILE


class SavedWeights(Mapping[str, Tensor]):
    """The weights in safetensors files by name, float32 on the CPU, each read when it is asked for.

    A process holds only what it keeps, and the processes of a host share the pages of the file.

    Args:
        files: safetensors files, which have no name in common.
    """

    def __init__(self, *files: Path) -> None:
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118
                    self.shapes[name], self._places[name] = tuple(content.get_slice(name).get_shape()), file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], "pt") as content:
            return _float32(content.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by name, without reading those of a file."""
    return weights.shapes if isinstance(weights, SavedWeights) else {n: tuple(w.shape) for n, w in weights.items()}


def without_ties(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights for a safetensors file, which holds a parameter with several names once under each of them."""
    seen: set[tuple[int, int]] = set()
    found = {}
    for name, value in weights.items():
        place = value.untyped_storage().data_ptr(), int(value.storage_offset())
        found[name] = value.clone() if place in seen and value.numel() else value.contiguous()
        seen.add(place)
    return found


def open_weights(folder: str | Path) -> tuple[Mapping[str, Tensor], Path]:
    """Return what `read_weights` does, but read the tensors of a safetensors file only when they are asked for."""
    for place in [Path(folder), *reversed(checkpoints(folder))]:
        if (place / WEIGHTS_FILE).is_file():
            return SavedWeights(place / WEIGHTS_FILE, *frozen_files(place)), place / WEIGHTS_FILE
        if shards_of(place) is not None:
            break
    return read_weights(folder)


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
            return {**_from_shards(shards), **SavedWeights(*frozen_files(place))}, shards
        if file.is_file():
            return dict(SavedWeights(file, *frozen_files(place))), file
    raise ConfigError(f"{folder}: neither {WEIGHTS_FILE} nor ZeRO shards in the folder or in its checkpoints")


def frozen_files(checkpoint: Path) -> list[Path]:
    """Return the file with the frozen weights that a checkpoint does not hold; an empty list if it holds all.

    Raises:
        ConfigError: the file is not beside the checkpoint, or is not the one that it was saved with.
    """
    note = checkpoint / FROZEN_ENTRY
    if not note.is_file():
        return []
    entry = json.loads(note.read_text())
    file = checkpoint.parent / entry.pop("file", FROZEN_FILE)
    if not file.is_file() or _entry(file, file.stat().st_mtime_ns) != entry:
        raise ConfigError(
            f"{checkpoint} was saved without its frozen weights (trainer.save_frozen: false), and {file} "
            f"{'has others' if file.is_file() else 'is missing'}; put the file of its run there"
        )
    return [file]


def frozen_file(run: Path, names: Set[str]) -> Path:
    """Return the file of a run for frozen weights of these names: one that holds the same, or does not exist yet.

    Args:
        run: folder of the run, with frozen.safetensors, frozen-2.safetensors, ... of its earlier checkpoints.
        names: of the weights.
    """
    stem, _, suffix = FROZEN_FILE.partition(".")
    files = (run / (f"{stem}-{number}.{suffix}" if number > 1 else FROZEN_FILE) for number in count(1))
    return next(file for file in files if not file.is_file() or SavedWeights(file).keys() == names)


@cache
def _entry(file: Path, changed: int) -> dict[str, Any]:
    return file_entry(file)


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
