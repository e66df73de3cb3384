"""Loads a checkpoint without ZeRO into an engine with other tasks; the fp32 weights are whole on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.zero.checkpoint.layout import MODEL_FILE, Segments, read_file
from allinone_ds.zero.checkpoint.reshard import copy_segments, load_number, load_untrained, same_place


def optimizer_names(engine: Any) -> list[str] | None:
    """Return the names of the parameters that an engine's optimizer steps on, in the order of its numbers.

    They are the model's own without ZeRO in fp32. None: it steps on copies.

    Args:
        engine: a DeepSpeedEngine.
    """
    names = {id(param): name for name, param in engine.module.named_parameters()}
    params = [param for group in engine.optimizer.param_groups for param in group["params"]]
    return [names[id(param)] for param in params] if all(id(param) in names for param in params) else None


@torch.no_grad()
def load_whole(engine: Any, folder: Path, names: Sequence[str], segments: Segments) -> None:
    """Load weights and optimizer state of a checkpoint of ZeRO stage 0 in fp32. What is not there stays as it is.

    Args:
        engine: a DeepSpeedEngine of ZeRO stage 0 in fp32.
        folder: the checkpoint's folder of DeepSpeed's files (global_stepN).
        names: what `optimizer_names` returned of the engine that wrote it.
        segments: where tensors are that have other names, or other rows, in the checkpoint.
    """
    saved = read_file(folder / MODEL_FILE)
    states = {name: saved["optimizer"]["state"].get(number, {}) for number, name in enumerate(names)}
    optimizer = engine.optimizer
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    own = dict(engine.module.named_parameters())
    for name in optimizer_names(engine) or ():
        param = own[name]
        parts = segments.get(name, same_place(name, param))
        copy_segments(param, saved["module"], parts)
        for key, value in states[parts[0].name].items() if parts else ():
            if isinstance(value, Tensor) and value.dim():
                target = optimizer.state[param].setdefault(key, torch.zeros_like(param))
                copy_segments(target, {part.name: states[part.name][key] for part in parts}, parts)
            else:
                old = optimizer.state[param].get(key)
                optimizer.state[param][key] = load_number(value, old, param.device if beside else None)
    load_untrained(engine.module, saved["module"], segments)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved[counter])


@torch.no_grad()
def copy_whole(
    engine: Any, names: Sequence[str], sources: Sequence[Tensor], targets: Sequence[Tensor], segments: Segments
) -> None:
    """Copy tensors that lie as the parameters of a checkpoint's optimizer into those of this engine's optimizer.

    Args:
        engine: a DeepSpeedEngine of ZeRO stage 0 in fp32.
        names: what `optimizer_names` returned of the engine that wrote them.
        sources: one per name.
        targets: one per parameter of this engine's optimizer.
        segments: as in `load_whole`.
    """
    values: Mapping[str, Tensor] = dict(zip(names, sources, strict=True))
    for name, target in zip(optimizer_names(engine) or (), targets, strict=True):
        copy_segments(target, values, segments.get(name, same_place(name, target)))
