"""Whole shapes and values of parameters that ZeRO-3 may have partitioned. Checked on DeepSpeed 0.19.8."""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 manages the parameter, which is then flat and mostly empty; False for buffers."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> torch.Size:
    """Return the whole shape of a parameter or buffer, partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def whole_on_rank_0(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    """Gather a parameter inside a block, after which rank 0's values are kept. Collective."""
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def cast_unpartitioned(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that ZeRO-3 does not manage yet to the engine's dtype.

    A ViT is partitioned while it is built, in the engine's dtype. DeepSpeed leaves all other parameters as they are,
    and fails on the mixture.

    Args:
        model: before `deepspeed.initialize`.
        dtype: of the engine.
    """
    for parameter in model.parameters():
        if not is_partitioned(parameter):
            parameter.data = parameter.data.to(dtype)


def forget_copies(engine: Any) -> None:
    """Let the next use of every weight see its partition as it is now.

    With `zero_hpz_partition_size` ranks keep a copy of all weights within each group of ranks, from the first use of a
    weight, or its construction, to the next step. DeepSpeed 0.19.8 drops the copies of trained weights after it loads
    a checkpoint, but not those of frozen ones.

    Args:
        engine: what `deepspeed.initialize` returned.
    """
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of a model to the device of its engine.

    DeepSpeed 0.19.8 does not move a module that was built under ZeRO-3, whose parameters are on the device already.

    Args:
        model: before `deepspeed.initialize`.
        device: of the engine.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def whole_master(engine: Any, parameter: Any) -> Tensor:
    """Return the fp32 weight that the optimizer steps on, whole, as float64 on the CPU. Collective.

    Args:
        engine: what `deepspeed.initialize` returned.
        parameter: a trainable parameter of its module.

    Raises:
        KeyError: the optimizer does not hold the parameter.
    """
    if parameter.dtype == torch.float32:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().double().cpu().clone()
    if engine.zero_optimization_stage():
        return safe_get_full_fp32_param(parameter).detach().double().cpu().view(whole_shape(parameter))
    for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for param, master in zip(low, high, strict=True):
            if param is parameter:
                return master.detach().double().cpu().view_as(param)
    raise KeyError("the optimizer does not hold this parameter")
