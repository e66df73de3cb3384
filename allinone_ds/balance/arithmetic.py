"""Norms, inner products and scaled sums of gradient shards: one pass over the data each, no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements summed in float32 before float64 takes over: keeps a norm of any length within 1e-6."""


def square_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all elements, float64, 0-dim, on `device`.

    Args:
        tensors: 1-D tensors of any floating type.
        device: of the result when there is nothing to sum.
    """
    chunks = [chunk for tensor in tensors for chunk in tensor.split(CHUNK) if chunk.numel()]
    if not chunks:
        return torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.promote_types(chunks[0].dtype, torch.float32)
    norms = torch._foreach_norm(chunks, 2, dtype=dtype)
    return torch.stack(norms).double().square().sum()


def inner_products(shards: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Return the inner products of T gradients' parts on this rank, float64, (T, T).

    Args:
        shards: T lists of 1-D tensors, of equal lengths.
        device: of the result.
    """
    count = len(shards)
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    for i in range(count):
        for j in range(i, count):
            for a, b in zip(shards[i], shards[j], strict=True):
                for part_a, part_b in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
                    gram[i, j] += torch.dot(part_a, part_b).double()
            gram[j, i] = gram[i, j]
    return gram


def add_scaled(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor, usable: Tensor) -> None:
    """Add factor * gradients to `sums` in place, or nothing unless `usable`; never waits for an accelerator.

    Args:
        sums: 1-D tensors, changed in place.
        gradients: as `sums`, of any floating type; their content may be changed.
        factor: 0-dim.
        usable: 0-dim bool: False when the gradients may hold inf or nan.
    """
    if factor.is_cpu:
        if usable:
            alpha = float(factor)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient, alpha=alpha)
        return
    factor = torch.where(usable, factor, torch.zeros_like(factor)).float()
    for total, gradient in zip(sums, gradients, strict=True):
        total.addcmul_(gradient.nan_to_num_(0.0, 0.0, 0.0), factor)  # inf x 0 is nan


def scale_or_zero(tensor: Tensor, factor: Tensor, usable: Tensor) -> Tensor:
    """Return `tensor` times `factor`, in place, or zeros unless `usable`; never waits for an accelerator.

    Args:
        tensor: of any shape and floating type.
        factor: 0-dim.
        usable: 0-dim bool: False when the tensor may hold inf or nan.
    """
    if factor.is_cpu:
        return tensor.mul_(float(factor)) if usable else tensor.zero_()
    factor = torch.where(usable, factor, torch.zeros_like(factor))
    return tensor.nan_to_num_(0.0, 0.0, 0.0).mul_(factor.to(tensor.dtype))  # inf x 0 is nan
