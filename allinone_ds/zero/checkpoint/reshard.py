"""Loads a checkpoint into an engine with different shards: other ranks, ZeRO stage or precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.checkpoint.layout import SavedShards, Segment, Segments, in_checkpoint
from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.choose import open_engine
from allinone_ds.zero.fragments import Fragment
from allinone_ds.zero.params import whole_on_rank_0


@torch.no_grad()
def load_resharded(engine: Any, shards: Path, segments: Segments | None = None) -> None:
    """Load a checkpoint that a different number of ranks, or a different ZeRO stage, wrote. Collective.

    Every rank reads what it needs. Masters and optimizer state are copied element by element, so nothing is rounded.
    Learning rates and weight decays stay those of the engine. What is not in the checkpoint stays as it is, with
    moments of zero; a group of parameters of which nothing is there has no optimizer state, as before its first step.

    Args:
        engine: a DeepSpeedEngine, ZeRO stage 1, 2 or 3, in fp32, bf16 or fp16, its optimizer offloaded to the CPU or
            not.
        shards: the folder (global_stepN) with the files of all ranks, ZeRO stage 1, 2 or 3.
        segments: where tensors are that have other names, or other rows, in the checkpoint.

    Raises:
        UnsupportedEngine: the optimizer keeps a state that is neither as large as the weights nor one number.
        ValueError, KeyError: the files are not those of such a checkpoint of this model.
    """
    saved = SavedShards(shards)
    adapter = open_engine(engine)
    segments = segments or {}
    wanted = in_checkpoint(adapter.fragments(), segments)
    masters = [master.data.view(-1) for master in adapter.masters()]
    saved.fill(masters, wanted, saved.masters)
    _load_states(adapter, saved, wanted, _sources(engine, segments))
    if engine.fp16_enabled() and "loss_scaler" in saved.optimizer:
        engine.optimizer.loss_scaler = saved.optimizer["loss_scaler"]
        engine.optimizer.dynamic_loss_scale = saved.optimizer["dynamic_loss_scale"]
    engine.global_steps = saved.model["global_steps"]
    engine.global_samples = saved.model["global_samples"]
    engine.skipped_steps = saved.model["skipped_steps"]
    adapter.publish_masters()
    _load_untrained(engine.module, saved.untrained(), segments)


@torch.no_grad()
def reshard_flats(
    engine: Any,
    shards: Path,
    sources: Sequence[Sequence[Tensor]],
    targets: Sequence[Tensor],
    segments: Segments | None = None,
) -> None:
    """Copy tensors with the layout of a checkpoint's masters into tensors with the layout of this engine's masters.

    Args:
        engine: a DeepSpeedEngine, ZeRO stage 1, 2 or 3.
        shards: the checkpoint's folder of shards.
        sources: by rank and group, like the masters of the engine that wrote it.
        targets: by group, like `EngineAdapter.masters` of this engine; their padding is left alone.
        segments: as in `load_resharded`; what is not in the checkpoint is left alone.
    """
    wanted = in_checkpoint(open_engine(engine).fragments(), segments or {})
    SavedShards(shards).fill([target.view(-1) for target in targets], wanted, sources)


def _sources(engine: Any, segments: Segments) -> dict[int, str]:
    """Return {group of this run: a parameter of the checkpoint that goes on in it}."""
    found: dict[int, str] = {}
    for group, named in enumerate(engine._get_zero_param_shapes()):
        for name in named:
            parts = segments.get(name)
            if parts is None or parts:
                found.setdefault(group, parts[0].name if parts else name)
    return found


def _load_states(
    adapter: EngineAdapter, saved: SavedShards, wanted: Sequence[Fragment], names: Mapping[int, str]
) -> None:
    """Load the optimizer state of this rank's masters: moments, and counters such as AdamW's `step`.

    Args:
        adapter: of the engine.
        saved: the checkpoint.
        wanted: elements of this rank's masters, where they are in the checkpoint.
        names: {group: a parameter of the checkpoint in it}; the other groups have no state.
    """
    masters = adapter.masters()
    base = adapter.optimizer.optimizer
    state = base.state
    # fused and capturable optimizers of torch keep the number of steps beside the weights
    beside = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    flat, plain = kinds_of_state(saved)
    filled: dict[str, set[int]] = {key: set() for key in flat}  # groups by key
    for group, master in enumerate(masters):
        if group not in names:
            continue
        rank, there, *_ = next(saved.where(names[group], 0, 1))
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


def _load_untrained(module: torch.nn.Module, values: dict[str, Tensor], segments: Segments) -> None:
    """Load buffers and frozen parameters, which are in no shard."""
    for name, buffer in module.named_buffers():
        _copy_segments(buffer, values, segments.get(name, _same(name, buffer)))
    for name, param in module.named_parameters():
        if not param.requires_grad:
            with whole_on_rank_0(param):  # on other ranks than 0 it is empty under ZeRO-3
                _copy_segments(param, values, segments.get(name, _same(name, param)))


def _same(name: str, value: Tensor) -> tuple[Segment]:
    return (Segment(0, value.numel(), name, 0),)


def _copy_segments(target: Tensor, values: dict[str, Tensor], parts: Sequence[Segment]) -> None:
    for part in parts if target.numel() else ():
        if part.name in values:
            source = values[part.name].reshape(-1).narrow(0, part.offset, part.length)
            if part.length == target.numel():
                target.copy_(source.view(target.shape))
            else:
                target.view(-1).narrow(0, part.start, part.length).copy_(source)
