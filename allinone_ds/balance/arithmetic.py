"""Norms, inner products and scaled sums of gradient shards: one pass over the data each, no wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements that are converted to float32 at a time."""
BATCH = 1 << 24
"""Elements of small tensors that are converted to float32 together."""
_ROW = 1 << 12
"""Elements that are summed in float32 before float64 takes over."""
_SHORT = 1 << 14
"""Elements that a CPU sums in float32 at once, for few operations on small parameters."""
_LONG = 1 << 26
"""Elements that an accelerator sums in float32 at once."""


def square_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all elements, float64, 0-dim, on `device`.

    Args:
        tensors: 1-D tensors of any floating type.
        device: of the tensors.
    """
    norms, _ = part_norms(tensors, device)
    return norms.double().square().sum()


def part_norms(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """Return the norms of parts of tensors, float32 or float64, (P,), and which tensor each part is of.

    Parts are so short that float32 sums each within 1e-6: a CPU's kernels are off by 1e-5 after a million elements,
    while those of an accelerator sum 65,536 elements at a time and then the sums.

    Args:
        tensors: 1-D tensors of any floating type.
        device: of the tensors.
    """
    parts: list[Tensor] = []
    rows: list[Tensor] = []
    owners: list[int] = []
    owners_of_rows: list[int] = []
    for index, tensor in enumerate(tensors):
        whole = 0
        if device.type == "cpu" and tensor.numel() > _SHORT:
            whole = tensor.numel() // _ROW * _ROW
            for piece in tensor[:whole].split(CHUNK):
                rows.append(torch.linalg.vector_norm(_at_least_float32(piece).view(-1, _ROW), dim=1))
            owners_of_rows += [index] * (whole // _ROW)
        rest = [tensor] if tensor.numel() <= _SHORT else tensor[whole:].split(_LONG)
        rest = [piece for piece in rest if piece.numel()]
        parts += rest
        owners += [index] * len(rest)
    if parts:
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        rows.insert(0, torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)))
    return torch.cat(rows) if rows else torch.zeros(0, device=device), owners + owners_of_rows


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


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
        sums: of any shapes, changed in place.
        gradients: of the shapes of `sums` and any floating type; their content may be changed.
        factor: 0-dim.
        usable: 0-dim bool: False when the gradients may hold inf or nan.
    """
    if not factor.is_cpu:
        _add_on_device(sums, gradients, factor, usable)
    elif usable:
        _add_products(sums, gradients, factor)


def _add_on_device(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor, usable: Tensor) -> None:
    """Read and write every element once, 16-bit gradients of float32 sums twice, in few operations."""
    alike, rest = _by_type(sums, gradients)
    mixed = [pair for pair in rest if pair[0].dtype == torch.float32]
    rest = [pair for pair in rest if pair[0].dtype != torch.float32]
    try:
        _add_fused(alike, factor, usable)
        for batch in _batches(mixed):
            _add_fused(_converted(batch), factor, usable)
    except NotImplementedError:  # an accelerator without this kernel
        rest += alike + mixed
    if rest:
        factor = torch.where(usable, factor, torch.zeros_like(factor))
        for _, gradient in rest:
            gradient.nan_to_num_(0.0, 0.0, 0.0)  # inf x 0 is nan
        _add_by_chunks(rest, factor)


def _add_fused(pairs: Sequence[tuple[Tensor, Tensor]], factor: Tensor, usable: Tensor) -> None:
    """Add with the kernel of a fused SGD, which leaves its sums alone where `found_inf`, to tensors of one type.

    Private function of torch 2.11 to 2.14, as those of `torch.optim.SGD(fused=True)`; it multiplies in float32.
    """
    if pairs:
        totals, values = map(list, zip(*pairs, strict=True))
        torch._fused_sgd_(
            totals, values, [], weight_decay=0.0, momentum=0.0, lr=factor.float(), dampening=0.0, nesterov=False,
            maximize=True, is_first_step=False, found_inf=(~usable).float(),
        )  # fmt: skip


def _converted(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs with gradients of the type and layout of their sums."""
    totals, values = map(list, zip(*pairs, strict=True))
    copies = [torch.empty_like(total) for total in totals]
    torch._foreach_copy_(copies, values)
    return list(zip(totals, copies, strict=True))


def _batches(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield pairs, together no more than BATCH elements or a single one."""
    batch: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in pairs:
        if batch and count + pair[0].numel() > BATCH:
            yield batch
            batch, count = [], 0
        batch.append(pair)
        count += pair[0].numel()
    if batch:
        yield batch


def _add_products(sums: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Add factor * gradients in float32: a 16-bit factor would shrink or enlarge every element alike."""
    alike, rest = _by_type(sums, gradients)
    number = float(factor)
    for total, gradient in alike:
        if total.dtype.itemsize >= 4:
            total.add_(gradient, alpha=number)
        else:
            rest.append((total, gradient))
    _add_by_chunks(rest, factor)


def _add_by_chunks(pairs: Sequence[tuple[Tensor, Tensor]], factor: Tensor) -> None:
    for total, gradient in pairs:
        flat = total.is_contiguous() and gradient.is_contiguous()
        parts = (tensor.view(-1).split(CHUNK) if flat else [tensor] for tensor in (total, gradient))
        for part, chunk in zip(*parts, strict=True):
            part.copy_(part.float().addcmul_(chunk.float(), factor.float()))


def _by_type(
    sums: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return the pairs of one type and layout, and all others."""
    alike: list[tuple[Tensor, Tensor]] = []
    rest: list[tuple[Tensor, Tensor]] = []
    for total, gradient in zip(sums, gradients, strict=True):
        same = total.dtype == gradient.dtype and total.stride() == gradient.stride()
        (alike if same else rest).append((total, gradient))
    return alike, rest


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
