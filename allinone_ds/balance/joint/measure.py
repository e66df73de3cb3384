"""Measures of T tasks' gradients at the features, and their scaled sum: few operations, no wait for the device.

Each task has a gradient for each of the L tensors that the heads read (feature levels), or None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allinone_ds.balance.arithmetic import CHUNK, part_norms
from allinone_ds.device_constants import copied_to

Gradients = Sequence[Sequence[Tensor | None]]
"""T rows of L gradients; an empty row is a task without any."""


def squares(gradients: Gradients, device: torch.device) -> Tensor:
    """Return the sum of squares of each task's gradient on this rank, float64, (T,).

    Args:
        gradients: of the tasks.
        device: of the gradients.
    """
    rows = [task for task, row in enumerate(gradients) for gradient in row if gradient is not None]
    tensors = [gradient.reshape(-1) for row in gradients for gradient in row if gradient is not None]
    norms, parts = part_norms(tensors, device)
    values, owners = norms.double().square(), [rows[part] for part in parts]
    if owners == list(range(len(gradients))):
        return values
    found = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    return found.index_add_(0, copied_to(torch.tensor(owners, dtype=torch.long), device), values)


def gram_matrix(gradients: Gradients, device: torch.device) -> Tensor:
    """Return the inner products of the tasks' gradients on this rank, float64, (T, T).

    Args:
        gradients: of the tasks.
        device: of the result when there is nothing to sum.
    """
    count = len(gradients)
    found = torch.zeros(count, count, dtype=torch.float64, device=device)
    for level in range(max(map(len, gradients), default=0)):
        rows = [row[level] if row else None for row in gradients]
        like = next((row for row in rows if row is not None), None)
        if like is None:
            continue
        flats = [torch.zeros_like(like).reshape(-1) if row is None else row.reshape(-1) for row in rows]
        size = max(CHUNK // count, 1)
        for start in range(0, like.numel(), size):  # in float64, so that TF32 has no part in it
            block = torch.stack([flat[start : start + size] for flat in flats]).double()  # (T, chunk)
            found += block @ block.T
    return found


def add_scaled(gradients: Gradients, factors: Tensor, sums: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return sums + sum_t c_t g_t for each of the L tensors, in float32 or wider; None where there is no gradient.

    Args:
        gradients: of the tasks; they are not changed.
        factors: (T,); 0 leaves a gradient out, also one that is not finite.
        sums: L sums so far, changed in place; None: 0.
    """
    on_cpu = factors.tolist() if factors.is_cpu else None
    each = factors.unbind()
    totals = list(sums)
    for level in range(max(map(len, gradients), default=0)):
        found = ((task, row[level]) for task, row in enumerate(gradients) if row)
        rows = [(task, gradient) for task, gradient in found if gradient is not None]
        for task, gradient in rows:
            if on_cpu is not None and not on_cpu[task]:
                continue
            total = totals[level]
            if total is None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                totals[level] = total = torch.zeros_like(gradient, dtype=wide)
            if on_cpu is None:  # 0 x inf is nan
                total.addcmul_(torch.where(each[task] != 0, gradient, 0.0), each[task])
            else:
                total.add_(gradient, alpha=on_cpu[task])
    return totals
