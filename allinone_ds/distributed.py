"""What a rank needs to know of the other ranks, and small exchanges with them. A job of one rank needs no group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_cpu_groups: dict[bool, tuple[Any, Any]] = {}
"""Whether the group is apart from training's -> (the default group when it was made, the group)."""


def rank() -> int:
    """Return this process's rank, 0..R-1; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks R; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cpu_group(apart: bool = False) -> Any:
    """Return a process group of all ranks for small CPU messages, which never wait for an accelerator. Collective.

    The group is made at the first call and kept until the default group ends, so repeated calls cost nothing.

    Args:
        apart: a group that training never uses, for a thread beside it: its messages cannot meet those of a step.

    Returns:
        The group; None, which is the default group, on one rank, or when that is gloo already and `apart` is False.
    """
    if world_size() == 1 or (not apart and dist.get_backend() == "gloo"):
        return None
    default = dist.group.WORLD
    made_under, group = _cpu_groups.get(apart, (None, None))
    if made_under is not default:
        group = dist.new_group(backend="gloo")
        _cpu_groups[apart] = default, group
    return group


def leave() -> None:
    """Leave the default process group and all groups made from it; nothing happens without one.

    With gloo, a process that just exits may abort. Do not call it after an error: other ranks may still be in a
    collective, and this one would wait for them.
    """
    _cpu_groups.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Tensor:
    """Reduce a tensor over all ranks, in place; return it. Collective."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Return whether a flag is set on any rank. Collective.

    Args:
        flag: of this rank.
        device: of the message; None is the CPU.
    """
    return bool(all_reduce(torch.tensor(float(flag), device=device), dist.ReduceOp.MAX))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's value, in the order of ranks. Collective."""
    every = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, value, group=group)
    return every


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Return rank 0's value. Collective."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def barrier(group: Any = None) -> None:
    """Wait for all ranks. Collective."""
    if world_size() > 1:
        dist.barrier(group=group)
