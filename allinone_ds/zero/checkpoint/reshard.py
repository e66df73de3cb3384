"""Loads a checkpoint into an engine with different shards: other ranks, ZeRO stage or precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.checkpoint.layout import SavedShards
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.fragments import Fragment
from allinone_ds.zero.params import whole_on_rank_0


@torch.no_grad()
def load_resharded(engine: Any, shards: Path) -> None:
    """Load a checkpoint that a different number of ranks, or a different ZeRO stage, wrote. Collective.

    Every rank reads what it needs. Masters and optimizer state are copied element by element, so nothing is rounded.
    Learning rates and weight decays stay those of the engine.

    Args:
        engine: a DeepSpeedEngine, ZeRO stage 1, 2 or 3, in fp32, bf16 or fp16, its optimizer offloaded to the CPU or
            not.
        shards: the folder (global_stepN) with the files of all ranks, ZeRO stage 1, 2 or 3.

    Raises:
        UnsupportedEngine: the optimizer keeps a state that is neither as large as the weights nor one number.
        ValueError, KeyError: the files are not those of such a checkpoint of this model.
    """
    saved = SavedShards(shards)
    adapter = open_engine(engine)
    wanted = adapter.fragments()
    masters = [master.data.view(-1) for master in adapter.masters()]
    saved.fill(masters, wanted, saved.masters)
    _load_states(adapter, saved, wanted)
    if engine.fp16_enabled() and "loss_scaler" in saved.optimizer:
        engine.optimizer.loss_scaler = saved.optimizer["loss_scaler"]
        engine.optimizer.dynamic_loss_scale = saved.optimizer["dynamic_loss_scale"]
    engine.global_steps = saved.model["global_steps"]
    engine.global_samples = saved.model["global_samples"]
    engine.skipped_steps = saved.model["skipped_steps"]
    adapter.publish_masters()
    _load_untrained(engine.module, saved.untrained())


@torch.no_grad()
def reshard_flats(engine: Any, shards: Path, sources: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> None:
    """Copy tensors with the layout of a checkpoint's masters into tensors with the layout of this engine's masters.

    Args:
        engine: a DeepSpeedEngine, ZeRO stage 1, 2 or 3.
        shards: the checkpoint's folder of shards.
        sources: by rank and group, like the masters of the engine that wrote it.
        targets: by group, like `EngineAdapter.masters` of this engine; their padding is left alone.
    """
    SavedShards(shards).fill([target.view(-1) for target in targets], open_engine(engine).fragments(), sources)


def _load_states(adapter: EngineAdapter, saved: SavedShards, wanted: Sequence[Fragment]) -> None:
    """Load the optimizer state of this rank's masters: moments, and counters such as AdamW's `step`."""
    masters = adapter.masters()
    base = adapter.optimizer.optimizer
    state = base.state
    # fused and capturable optimizers of torch keep the number of steps beside the weights
    beside = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    flat, plain = kinds_of_state(saved)
    first = {fragment.group: fragment for fragment in reversed(wanted)}
    filled: dict[str, set[int]] = {key: set() for key in flat}  # groups by key
    for group, master in enumerate(masters):
        source = saved.states[0][0]  # for a rank that holds only padding of a group
        if group in first:
            rank, there, *_ = next(saved.where(first[group].name, first[group].offset, first[group].length))
            source = saved.states[rank][there]
        for key in plain & source.keys():
            state[master][key] = _number(source[key], state[master].get(key), master.device if beside else None)
        for key in flat & source.keys():
            if key not in state[master]:
                state[master][key] = torch.zeros_like(master.data)
            filled[key].add(group)
    for key, groups in filled.items():
        sources = [[part.get(key) for part in parts] for parts in saved.states]
        targets = [state[master][key].view(-1) if group in groups else None for group, master in enumerate(masters)]
        saved.fill(targets, [fragment for fragment in wanted if fragment.group in groups], sources)


def _number(value: Any, old: Any, device: torch.device | None) -> Any:
    """Return a copy of an optimizer's single number on the device where its step expects it.

    Args:
        value: as saved, on the CPU.
        old: what the optimizer has now.
        device: where it belongs if the optimizer has none yet; None: where it is.
    """
    if not isinstance(value, Tensor):
        return value
    device = old.device if isinstance(old, Tensor) else device
    return value.to(value.device if device is None else device, copy=True)


def kinds_of_state(saved: SavedShards) -> tuple[set[str], set[str]]:
    """Return the names of what the optimizer keeps per element, and of its single numbers.

    Raises:
        UnsupportedEngine: it keeps a state of a different kind.
    """
    flat: set[str] = set()
    plain: set[str] = set()
    for masters, states in zip(saved.masters, saved.states, strict=True):
        for master, state in zip(masters, states, strict=True):
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    plain.add(key)
                elif value.numel() >= master.numel():  # the file of a master may omit its padding
                    flat.add(key)
                else:
                    raise UnsupportedEngine(
                        f"{saved.folder}: the optimizer keeps '{key}' of shape {tuple(value.shape)} for "
                        f"{master.numel()} weights. Such a state cannot be divided for other ranks or another ZeRO "
                        f"stage: resume with {saved.world} ranks and the same stage, or use an element-wise "
                        "optimizer such as AdamW"
                    )
    return flat, plain


def _load_untrained(module: torch.nn.Module, values: dict[str, Tensor]) -> None:
    """Load buffers and frozen parameters, which are in no shard."""
    for name, buffer in module.named_buffers():
        if name in values:
            buffer.copy_(values[name])
    for name, param in module.named_parameters():
        if not param.requires_grad and name in values:
            with whole_on_rank_0(param):
                if param.numel():  # on other ranks than 0 it is empty under ZeRO-3
                    param.copy_(values[name].view(param.shape))
