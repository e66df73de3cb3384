"""Copy batches to the device of the model, on an accelerator one batch ahead."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a nested batch with its tensors on a device; dtypes do not change."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield nested batches on a device; on a GPU the next one is copied while the model works on the current one.

    Args:
        batches: on the CPU, in page-locked memory if the copies are to overlap with computation.
        device: of the model.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    stream = _copy_stream(device)
    waiting: list[Any] = []
    for batch in batches:
        with torch.cuda.stream(stream):
            waiting.append(to_device(batch, device))
        if len(waiting) > 1:
            yield _handed_over(waiting.pop(0), stream)
    yield from (_handed_over(batch, stream) for batch in waiting)


def _handed_over(batch: Any, stream: Any) -> Any:
    """Let the current stream wait for the copies, and their memory for the current stream."""
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    for tensor in _tensors(batch):
        tensor.record_stream(current)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
