"""Norms, inner products and scaled sums of gradient shards: one pass over the data each, no wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements summed in float32 before float64 takes over: keeps a norm of any length within 1e-6."""
_ROW = 1 << 12
"""Elements of two gradients that are multiplied and summed in float32 before float64 takes over."""


def square_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all elements, float64, 0-dim, on `device`.

    Args:
        tensors: 1-D tensors of any floating type.
        device: of the result when there is nothing to sum.
    """
    whole = [tensor for tensor in tensors if 0 < tensor.numel() <= CHUNK]
    chunks = whole + [chunk for tensor in tensors if tensor.numel() > CHUNK for chunk in tensor.split(CHUNK)]
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
    with float32_products():
        for pieces in zip(*shards, strict=True):  # of all tasks
            together = min(4 * CHUNK, -(-len(pieces[0]) // count)) or 1  # of all tasks no more than of one task
            for parts in zip(*(piece.split(together) for piece in pieces), strict=True):
                rows = torch.stack(parts).float()  # (T, n)
                row = min(_ROW, rows.shape[1]) or 1
                rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % row)).unflatten(1, (-1, row))
                rows = rows.transpose(0, 1)  # (n / 4096, T, 4096)
                gram += torch.bmm(rows, rows.transpose(1, 2)).sum(0, dtype=torch.float64)
    return (gram + gram.T) / 2  # a product may round its two halves differently


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside this block, whatever the process has chosen (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_scaled(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor, usable: Tensor) -> None:
    """Add factor * gradients to `sums` in place, or nothing unless `usable`; never waits for an accelerator.

    Args:
        sums: 1-D tensors, changed in place.
        gradients: as `sums`, of any floating type; their content may be changed.
        factor: 0-dim.
        usable: 0-dim bool: False when the gradients may hold inf or nan.
    """
    if not factor.is_cpu:
        _add_on_device(sums, gradients, factor, usable)
    elif usable:
        _add_products(sums, gradients, factor)


def _add_on_device(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor, usable: Tensor) -> None:
    factor = torch.where(usable, factor, torch.zeros_like(factor))
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)  # inf x 0 is nan
    _add_products(sums, gradients, factor)


def _add_products(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Add factor * gradients in float32: a 16-bit factor would shrink or enlarge every element alike."""
    pairs = list(zip(sums, gradients, strict=True))
    alike = [(total, gradient) for total, gradient in pairs if _sums_as_is(total, gradient)]
    if alike:
        totals, values = map(list, zip(*alike, strict=True))
        if factor.is_cpu:
            torch._foreach_add_(totals, values, alpha=float(factor))
        else:  # two operations for all tensors
            torch._foreach_mul_(values, factor.float())
            torch._foreach_add_(totals, values)
    for total, gradient in pairs if len(alike) < len(pairs) else []:
        if not _sums_as_is(total, gradient):
            for part, chunk in zip(total.split(CHUNK), gradient.split(CHUNK), strict=True):
                part.copy_(part.float().addcmul_(chunk.float(), factor.float()))


def _sums_as_is(total: Tensor, gradient: Tensor) -> bool:
    return total.dtype == gradient.dtype and total.dtype.itemsize >= 4


def scale_or_zero(tensor: Tensor, factor: Tensor, usable: Tensor) -> Tensor:
    """Return `tensor` times `factor`, in place, or zeros unless `usable`; never waits for an accelerator.

    Args:
        tensor: of any shape and floating type.
        factor: 0-dim.
        usable: 0-dim bool: False when the tensor may hold inf or nan.
    """
    if factor.is_cpu:
        return scale(tensor, factor) if usable else tensor.zero_()
    return _scale_on_device(tensor, factor, usable)


def _scale_on_device(tensor: Tensor, factor: Tensor, usable: Tensor) -> Tensor:
    factor = torch.where(usable, factor, torch.zeros_like(factor))
    return scale(tensor.nan_to_num_(0.0, 0.0, 0.0), factor)  # inf x 0 is nan


def scale(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return `tensor` times `factor`, in place. The product is float32: a 16-bit factor would move every element alike.

    Args:
        tensor: of any shape and floating type.
        factor: 0-dim.
    """
    factor = factor.float()
    if tensor.dtype.itemsize >= 4:
        return tensor.mul_(factor)
    for part in tensor.view(-1).split(CHUNK) if tensor.is_contiguous() else [tensor]:
        part.copy_(part.float().mul_(factor))
    return tensor
