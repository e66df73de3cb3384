"""Collective operations of device tensors: gloo moves the bytes; streams are ordered as NCCL orders them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.fake_device.accelerator import Event, Stream
from tests.fake_device.backend import is_device, on_host
from tests.fake_device.record import record


class _Work(dist._Work):  # type: ignore[name-defined]
    """An operation that is done on the host already, and runs on a stream of its own on the device."""

    def __init__(self, event: Event | None):
        super().__init__()
        self._event = event

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self._event is not None:
            self._event.wait()
        return True

    def is_completed(self) -> bool:
        return True


class FakeCollectives(dist.ProcessGroup):
    """A process group of device and host tensors."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._stream: Stream | None = None

    def getBackendName(self) -> str:
        return "fakeccl"

    def _call(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], *arguments: Any) -> _Work:
        getattr(self._gloo, name)(*(_hosts(a) for a in arguments)).wait()
        if not any(is_device(t) for t in (*reads, *writes)):
            return _Work(None)
        if self._stream is None:
            self._stream = Stream()
        self._stream.wait_stream(Stream(number=record.stream))
        before, record.stream = record.stream, self._stream.number
        record.launch(name, [t for t in reads if is_device(t)], [t for t in writes if is_device(t)])
        record.stream = before
        return _Work(self._stream.record_event())

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        return self._call("allreduce", tensors, tensors, tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        for tensor in tensors:
            work = self.allreduce([tensor])
        return work

    def broadcast(self, tensors: list[Tensor], opts: Any) -> _Work:
        return self._call("broadcast", tensors, tensors, tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> _Work:
        return self._call("reduce", tensors, tensors, tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        return self._call("allgather", inputs, outputs[0], outputs, inputs, opts or dist.AllgatherOptions())

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        return self._call("_allgather_base", [input], [output], output, input, opts or dist.AllgatherOptions())

    all_gather_single = _allgather_base

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Work:
        return self._call("reduce_scatter", inputs[0], outputs, outputs, inputs, opts or dist.ReduceScatterOptions())

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> _Work:
        options = opts or dist.ReduceScatterOptions()
        return self._call("_reduce_scatter_base", [input], [output], output, input, options)

    reduce_scatter_single = _reduce_scatter_base

    def barrier(self, opts: Any = None) -> _Work:
        return self._call("barrier", [], [])


def register() -> None:
    """Add the backend "fakeccl" to torch.distributed."""
    if not hasattr(dist.Backend, "FAKECCL"):
        dist.Backend.register_backend(
            "fakeccl",
            lambda store, rank, size, timeout: FakeCollectives(store, rank, size, timeout),
            devices=["cpu", "fake"],
        )


def _hosts(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_hosts(part) for part in value]
    return on_host(value) if is_device(value) else value
