"""Load pretrained weights into a model of `transformers`, and say which tensors were loaded and which were not."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.integrations import deepspeed as integration
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from allinone_ds.distributed import rank
from allinone_ds.errors import ConfigError

_EXAMPLES = 3  # names that a message lists
_UNUSED = re.compile(r"(^|\.)(mask_token$|pooler\.)")  # tensors that no feature map depends on
_ANTIALIASED = ("dinov2_with_registers",)  # architectures that interpolate their positions with antialiasing
_WHERE = "model.backbone.checkpoint"


@dataclass(frozen=True)
class LoadedWeights:
    """Which tensors of a model came from a checkpoint.

    Attributes:
        source: folder or hub name of the checkpoint.
        total: number of tensors of the model.
        missing: tensors of the model that the checkpoint does not contain; they keep random values.
        unexpected: tensors of the checkpoint that the model does not have; they are ignored.
        prefix: part that was removed from the beginning of the names in the checkpoint.
        resized: position embeddings that were interpolated to a different image size.
        changed: settings of the model that differ from the checkpoint's, as texts "KEY = VALUE (VALUE THERE)".
        option: key of the run's file that named the source.

    Example:
        >>> loaded = LoadedWeights("dino", total=9, missing=("layernorm.bias",), unexpected=(), prefix="module.")
        >>> str(loaded).split("; ", 1)[1]
        "the prefix 'module.' was removed; 1 missing and left random (layernorm.bias); 0 unexpected"
        >>> loaded.loaded, loaded.complete
        (8, False)
    """

    source: str
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    prefix: str = ""
    resized: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    option: str = "model.backbone.checkpoint"

    @property
    def loaded(self) -> int:
        """Number of tensors that were loaded."""
        return self.total - len(self.missing)

    @property
    def complete(self) -> bool:
        """Whether every tensor that a forward uses was loaded, into a model with the checkpoint's settings."""
        return all(_UNUSED.search(name) for name in self.missing) and not self.changed

    def __str__(self) -> str:
        parts = [f"{self.option}: {self.source}: {self.loaded} of {self.total} tensors loaded"]
        if self.prefix:
            parts.append(f"the prefix '{self.prefix}' was removed")
        if self.resized:
            parts.append(f"interpolated to this image size: {', '.join(self.resized)}")
        random = any(not _UNUSED.search(name) for name in self.missing)
        parts.append(_count("missing and left random" if random else "missing", self.missing))
        parts.append(_count("unexpected", self.unexpected))
        if self.changed:
            parts.append(f"settings that differ: {', '.join(self.changed)}")
        return "; ".join(parts)


def checkpoint_config(checkpoint: str) -> Any:
    """Return the configuration of a folder of `transformers`, or of a repository on the hub, which is downloaded.

    Raises:
        ConfigError: there is no such folder, or the hub cannot be reached or has no such repository.
    """
    path = checkpoint.startswith((".", "/")) or checkpoint.count("/") > 1
    if path and not Path(checkpoint).is_dir():
        raise ConfigError(f"{_WHERE}: {checkpoint} is no folder; correct the path, or give OWNER/NAME of the hub")
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(checkpoint).is_dir():
            raise ConfigError(f"{_WHERE}: {checkpoint}: {reason}") from error
        raise ConfigError(
            f"{_WHERE}: '{checkpoint}' is no folder, and cannot be read from the hub: {reason} Without a network, run "
            f"`hf download {checkpoint} --local-dir FOLDER` on a machine that has one, and give the copied folder"
        ) from error


def load_pretrained(
    cls: Any, checkpoint: str, config: Any, min_loaded: float, changed: Mapping[str, tuple[Any, Any]]
) -> tuple[Any, LoadedWeights]:
    """Build a model of `transformers` with the weights of a checkpoint. Under ZeRO-3 it is partitioned as it is built.

    `from_pretrained` alone ignores tensors whose names do not fit, and the model trains from random weights. Here the
    names are first compared on the `meta` device. A common prefix, such as "teacher.backbone.", is removed, and so is
    the nesting of a .bin file, such as {"state_dict": ...}.

    Args:
        cls: class of the model.
        checkpoint: folder or hub name with safetensors or .bin files.
        config: configuration of the model.
        min_loaded: smallest fraction of the model's tensors that the checkpoint must contain.
        changed: settings of `config` that differ from the checkpoint's: name -> (value, value of the checkpoint).

    Returns:
        The model in float32, and what was loaded.

    Raises:
        ConfigError: the files cannot be read, too few tensors fit, or tensors have different shapes.
    """
    files = _weight_files(checkpoint)
    differing = tuple(f"config.{key} = {mine} ({theirs} there)" for key, (mine, theirs) in changed.items())
    shapes = _read(files, "meta")
    with torch.device("meta"):
        expected = set(cls(config).state_dict())
    prefix = common_prefix(shapes, expected)
    info = _compare(cls, config, without_prefix(shapes, prefix))
    resized = _resizable(info["mismatched_keys"], shapes, prefix)
    _refuse_other_shapes(checkpoint, info["mismatched_keys"], resized, len(expected), differing)
    outside = [name for name in shapes if not name.startswith(prefix)]
    # settings that act in training only, or that the interpolation allows for, do not change what the weights compute
    harmless = [text for text in differing if "drop" in text or "image_size" in text]
    loaded = LoadedWeights(
        checkpoint,
        total=len(expected),
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted([*outside, *(prefix + name for name in info["unexpected_keys"])])),
        prefix=prefix,
        resized=tuple(sorted(resized)),
        changed=tuple(text for text in differing if text not in harmless),
    )
    if loaded.loaded < min_loaded * loaded.total:
        raise ConfigError(
            f"{loaded}. At least {min_loaded:.0%} of the tensors must be loaded; give a checkpoint of this "
            "architecture, correct model.backbone.config, or lower model.backbone.min_loaded to start the others from "
            "random weights"
        )
    # under ZeRO-3 only rank 0 needs the values, which `transformers` then distributes layer by layer
    state = _read(files, "meta" if integration.is_deepspeed_zero3_enabled() and rank() else "cpu")
    for name, shape in resized.items():
        state[prefix + name] = _interpolated(state[prefix + name], shape, config.model_type in _ANTIALIASED)
    with _quiet():
        model = cls.from_pretrained(None, config=config, state_dict=without_prefix(state, prefix), dtype=torch.float32)
    return model, loaded


def _weight_files(checkpoint: str) -> list[str]:
    """Return the files of a checkpoint, safetensors first; files of the hub are downloaded."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for name in names:
        file = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        if not name.endswith(".json"):
            return [file]
        try:
            shards = get_checkpoint_shard_files(checkpoint, file)[0]
        except (KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{_WHERE}: {file} is no index of weight files ({error}); save it again") from error
        absent = [shard for shard in shards if not Path(shard).is_file()]
        if absent:
            raise ConfigError(f"{_WHERE}: {len(absent)} of the {len(shards)} files that {file} lists do not exist, "
                              f"among them {Path(absent[0]).name}; copy them too")  # fmt: skip
        return list(shards)
    raise ConfigError(f"{_WHERE}: {checkpoint} has none of {', '.join(names)}; save the model with save_pretrained")


def _read(files: Iterable[str], device: str) -> dict[str, Tensor]:
    """Return the tensors of weight files by name; those of nested mappings have dotted names."""
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(_flattened(load_state_dict(file, map_location=device)))
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{_WHERE}: {file} cannot be read: {error}; save or copy it again") from error
    return state


def _flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))


def common_prefix(names: Iterable[str], expected: set[str]) -> str:
    """Return what stands before the model's names in most of the names; with equal counts that of a teacher's or
    averaged weights, then the shortest.
    """
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        start = next((i for i in range(len(parts)) if ".".join(parts[i:]) in expected), None)
        if start is not None:
            votes["".join(f"{part}." for part in parts[:start])] += 1
    averaged = ("teacher", "ema")
    return max(votes, key=lambda p: (votes[p], any(word in p for word in averaged), -len(p)), default="")


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _compare(cls: Any, config: Any, shapes: dict[str, Tensor]) -> dict[str, Any]:
    """Return missing, unexpected and mismatched tensors as `transformers` finds them, after its own renamings.

    Its path for ZeRO-3 does not look for the last two, so it is switched off here; nothing is allocated.
    """
    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            return cls.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )[1]
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar and the report of `transformers`, which `LoadedWeights` replaces."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _resizable(mismatched: Iterable[tuple[str, Any, Any]], shapes: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return name -> new shape of position embeddings that can be interpolated."""
    return {
        name: tuple(mine)
        for name, theirs, mine in mismatched
        if name.endswith("position_embeddings") and prefix + name in shapes and _grids(theirs, mine) is not None
    }


def _grids(theirs: Any, mine: Any) -> tuple[int, int, int] | None:
    """Return the number of tokens before the grid and the sides of both square grids; None if they are not square."""
    if len(theirs) != 3 or len(mine) != 3 or theirs[2] != mine[2]:
        return None
    for first in (1, 0):
        sides = [math.isqrt(max(int(shape[1]) - first, 0)) for shape in (theirs, mine)]
        if all(side > 0 and side**2 == shape[1] - first for side, shape in zip(sides, (theirs, mine), strict=True)):
            return first, sides[0], sides[1]
    return None


def _interpolated(embeddings: Tensor, shape: Any, antialias: bool) -> Tensor:
    """Return position embeddings (1, N, C) of a square grid at a different size, as `transformers` does in a forward.

    Args:
        embeddings: on the device `meta` only its shape is read.
        shape: (1, M, C).
        antialias: as the model's own interpolation does.
    """
    grids = _grids(embeddings.shape, shape)
    if embeddings.is_meta or grids is None:
        return embeddings.new_empty(shape)
    first, old, new = grids
    grid = embeddings[:, first:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, C, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([embeddings[:, :first].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def _refuse_other_shapes(
    checkpoint: str,
    mismatched: Iterable[tuple[str, Any, Any]],
    resized: Mapping[str, Any],
    total: int,
    differing: tuple[str, ...],
) -> None:
    wrong = sorted((name, tuple(theirs), tuple(mine)) for name, theirs, mine in mismatched if name not in resized)
    if not wrong:
        return
    name, theirs, mine = wrong[0]
    hint = f"this run sets {', '.join(differing)}" if differing else "its config.json does not describe its weights"
    raise ConfigError(
        f"{_WHERE}: {len(wrong)} of {total} tensors have other shapes in {checkpoint}: {name} is {theirs} there and "
        f"{mine} in this run; {hint}; use the checkpoint's sizes"
    )


def _count(what: str, names: tuple[str, ...]) -> str:
    if not names:
        return f"0 {what}"
    examples = ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
    return f"{len(names)} {what} ({examples})"
