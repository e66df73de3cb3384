"""Rank helpers and small exchanges between ranks. On a single rank none of them needs a process group.

"Collective" in a docstring means: every rank must call the function, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_cpu_groups: dict[bool, tuple[Any, Any]] = {}
"""`apart` of `cpu_group` -> (the default group at that time, the group)."""


def rank() -> int:
    """Return this process's rank, 0..R-1; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks R; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cpu_group(apart: bool = False) -> Any:
    """Return a gloo process group of all ranks for small CPU messages, which never wait for an accelerator. Collective.

    The first call creates the group; later calls return the same one until `leave`.

    Args:
        apart: return a second group that the training step never uses, for a thread that runs at the same time.

    Returns:
        The group. None, which stands for the default group, on a single rank, and if the default group is gloo and
        `apart` is False.
    """
    if world_size() == 1 or (not apart and dist.get_backend() == "gloo"):
        return None
    default = dist.group.WORLD
    created_under, group = _cpu_groups.get(apart, (None, None))
    if created_under is not default:
        group = dist.new_group(backend="gloo")
        _cpu_groups[apart] = default, group
    return group


def leave() -> None:
    """Destroy the default process group and all groups created from it; without one, do nothing.

    A process with a gloo group that exits without this call may abort. Do not call it after an error: other ranks may
    still be in a collective, and this rank would wait for them.
    """
    _cpu_groups.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Tensor:
    """Reduce a tensor over all ranks in place and return it. Collective."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Return whether a flag is set on any rank. Collective.

    Args:
        flag: the flag of this rank.
        device: device of the message; None is the CPU.
    """
    return bool(all_reduce(torch.tensor(float(flag), device=device), dist.ReduceOp.MAX))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the value of every rank, in the order of ranks. Collective."""
    every = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, value, group=group)
    return every


def first_difference(lines: Sequence[str]) -> str | None:
    """Return the first line in which ranks differ, as each rank has it; None when all have the same. Collective.

    Args:
        lines: of this rank.

    Returns:
        Such as "rank 0, 2: a = 1; rank 1: a = 2".
    """
    if world_size() == 1:
        return None
    group = cpu_group()
    digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
    extremes = all_reduce(torch.tensor([digest, -digest]), dist.ReduceOp.MAX, group)
    if extremes[0] == -extremes[1]:
        return None
    for row in zip_longest(*gather_objects(list(lines), group), fillvalue="nothing"):
        if len(set(row)) > 1:
            ranks = {line: ", ".join(str(r) for r, own in enumerate(row) if own == line) for line in row}
            return "; ".join(f"rank {numbers}: {line}" for line, numbers in ranks.items())
    return None


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Return the value of rank 0. Collective."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def barrier(group: Any = None) -> None:
    """Wait for all ranks. Collective."""
    if world_size() > 1:
        dist.barrier(group=group)
