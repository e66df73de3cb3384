"""Bytes of tensors, as PyTorch's allocator counts them: neither other load nor fragments of the heap change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def peak_tensor_bytes(call: Callable[[], Any]) -> int:
    """Return the largest number of bytes of CPU tensors in a call, beyond those that were there before.

    Temporary tensors of an operation count as well; buffers of communication libraries do not.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
