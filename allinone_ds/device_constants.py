"""Small tensors on an accelerator without a wait for it, as `torch.tensor(values, device=...)` makes in every call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def constant(values: Sequence[Any], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return fixed numbers on the device of a tensor, copied there the first time. Do not change them in place.

    Args:
        values: numbers, or nested sequences of them; the same in every call of a place.
        like: a tensor on the device.
        dtype: of the result.

    Example:
        >>> constant([0.5, 2.0], like=torch.ones(3))
        tensor([0.5000, 2.0000])
    """
    if type(like) is Tensor or type(like) is torch.nn.Parameter:
        if not torch.compiler.is_compiling():
            return _constant(_nested(values), dtype, like.device)
    return torch.tensor(values, dtype=dtype, device=like.device)  # a tracer must not meet a tensor of an earlier call


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, copied without a wait for what the device still does."""
    if device.type != "cpu" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _nested(values: Any) -> Any:
    return tuple(_nested(value) for value in values) if isinstance(values, (list, tuple)) else values


@functools.lru_cache(maxsize=512)
def _constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be saved for a backward
        return torch.tensor(values, dtype=dtype, device=device)
