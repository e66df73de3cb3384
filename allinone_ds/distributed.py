"""Rank helpers and small exchanges between ranks. On a single rank none of them needs a process group.

"Collective" in a docstring means: every rank must call the function, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_cpu_groups: dict[str, tuple[Any, Any]] = {}
"""`apart` of `cpu_group` -> (the default group at that time, the group)."""


def rank() -> int:
    """Return this process's rank, 0..R-1; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks R; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cpu_group(apart: str = "") -> Any:
    """Return a gloo process group of all ranks for small CPU messages, which never wait for an accelerator. Collective.

    The first call creates the group; later calls return the same one until `leave`.

    Args:
        apart: name of a group of its own, for a thread that runs at the same time, or for messages that must never meet
            those of other code when ranks are out of step; empty: the group that all others share.

    Returns:
        The group. None, which stands for the default group, on a single rank, and if the default group is gloo and
        `apart` is empty.
    """
    if world_size() == 1 or (not apart and dist.get_backend() == "gloo"):
        return None
    default = dist.group.WORLD
    created_under, group = _cpu_groups.get(apart, (None, None))
    if created_under is not default:
        group = dist.new_group(backend="gloo")
        _cpu_groups[apart] = default, group
    return group


@contextlib.contextmanager
def watched_waits(wait: Callable[[Any], None]) -> Iterator[None]:
    """Wait with `wait` for the collective operations that this thread runs inside this block, if gloo runs them.

    gloo waits on the CPU until a timeout of half an hour. NCCL only puts work on a stream, so that a rank goes on to
    its next message on the CPU in any case.

    Args:
        wait: gets a `torch.distributed.Work`; returns when it is done, or raises.
    """
    if world_size() == 1 or dist.get_backend() != "gloo":
        yield
        return
    original, thread = dist.Work.wait, threading.get_ident()

    def watched(work: Any, *timeout: Any, **options: Any) -> bool:
        if timeout or options or threading.get_ident() != thread:
            return original(work, *timeout, **options)
        wait(work if _has_timeout(work) else _ThreadedWork(lambda: original(work)))
        return True

    dist.Work.wait = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


def wait_for_device(wait: Callable[[Any], None], device: torch.device) -> None:
    """Wait for what a GPU has been given so far, such as an operation of NCCL that other ranks do not join.

    Does nothing on other devices, which do not run ahead of the CPU.

    Args:
        wait: as in `watched_waits`.
        device: the GPU.
    """
    if device.type == "cuda" and world_size() > 1:
        wait(_DeviceWork(torch.cuda.Event()))


class _DeviceWork:
    """What the current stream of a GPU has been given when it is created.

    Attributes:
        looks: a GPU may take any time.
    """

    looks = math.inf

    def __init__(self, event: Any):
        event.record()
        self._event = event

    def wait(self, timeout: timedelta) -> bool:
        """Raise unless the GPU is done in time."""
        end = time.monotonic() + timeout.total_seconds()
        while not self._event.query():
            if time.monotonic() > end:
                raise RuntimeError("the device is not done")
            time.sleep(5e-5)
        return True

    def is_completed(self) -> bool:
        """Return whether the GPU is done."""
        return bool(self._event.query())


def _has_timeout(work: Any) -> bool:
    """Return whether a wait can end before the work: not that of gloo's reduce-scatter, which has no future either."""
    try:
        work.get_future()
    except RuntimeError:
        return False
    return True


class _ThreadedWork:
    """Work whose own wait has no timeout, so that a thread waits for it."""

    def __init__(self, wait: Callable[[], Any]):
        self._wait = wait
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, timeout: timedelta) -> bool:
        """Raise unless the work is done in time."""
        self._thread.join(timeout.total_seconds())
        if self._thread.is_alive():
            raise RuntimeError("the work is not done")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Return whether the work is done or has failed."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._wait()
        except BaseException as error:
            self._error = error


def extend_timeouts(seconds: float) -> None:
    """Let no process group give up before `seconds`, also those that DeepSpeed created with a default of their own.

    NCCL ends a process whose collective operation takes longer than its group's timeout, by default 10 minutes.

    Args:
        seconds: the least timeout of every group that exists now.
    """
    least = timedelta(seconds=seconds)
    set_timeout: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.14
    for group in list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []:
        for device in group._device_types:
            options = getattr(group._get_backend(device), "options", None)
            if options is not None and options._timeout < least:
                set_timeout(least, group)


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
