"""Parameters that ZeRO-3 may have cut among the ranks: what they are as a whole. Checked on DeepSpeed 0.19.8."""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has taken the parameter over; it is then flat and mostly empty. False for buffers."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter or buffer, cut among the ranks or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def whole_on_rank_0(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside the block the parameter is whole, and what rank 0 writes into it counts. Collective."""
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def cast_unpartitioned(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what ZeRO-3 has not yet taken over to the engine's dtype.

    A ViT is born partitioned, in the engine's dtype. DeepSpeed then leaves all other parameters as they are, and fails
    on the mixture.
    """
    for parameter in model.parameters():
        if not is_partitioned(parameter):
            parameter.data = parameter.data.to(dtype)


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
                return master.detach().double().view_as(param)
    raise KeyError("the optimizer does not hold this parameter")
