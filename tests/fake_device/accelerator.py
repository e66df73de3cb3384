"""DeepSpeed's accelerator on the fake device: streams and events that are recorded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.real_accelerator import set_accelerator
from torch import Tensor

from tests.fake_device import backend
from tests.fake_device.record import record

_numbers = itertools.count(1)


class Stream:
    """A queue of kernels; number 0 is the default stream."""

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None):
        self.number = next(_numbers) if number is None else number
        record.clocks.create_stream(self.number)

    def wait_stream(self, stream: Stream) -> None:
        """Let kernels from now on run after those that are in `stream` now."""
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        """Let kernels from now on run after an event."""
        if not record.ignores():
            record.clocks.stream_wait_for_event(self.number, event.number)

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event after the kernels that are in the stream now."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait."""
        if not record.ignores():
            record.clocks.all_streams_wait_for_stream(self.number)
        record.note("sync", "stream.synchronize")

    def query(self) -> bool:
        """Return whether everything is done."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, **options: Any):
        self.number = next(_numbers)
        record.clocks.create_event(self.number)

    def record(self, stream: Stream | None = None) -> None:
        """Stand for what is in the stream now."""
        record.clocks.record_state(self.number, record.stream if stream is None else stream.number)

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait."""
        record.clocks.stream_wait_for_event(record.stream if stream is None else stream.number, self.number)

    def synchronize(self) -> None:
        """Let the host wait."""
        record.clocks.all_streams_wait_for_event(self.number)
        record.note("sync", "event.synchronize")

    def query(self) -> bool:
        """Return whether the event has happened; a program must not rely on it."""
        return False

    def elapsed_time(self, other: Event) -> float:
        """Return milliseconds."""
        return 0.0


class FakeAccelerator(CPU_Accelerator):
    """The fake device for DeepSpeed; everything that is not about streams is as on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._name = backend.NAME

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return backend.NAME if device_index is None else f"{backend.NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return backend.DEVICE

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "fakeccl"

    def is_fp16_supported(self) -> bool:
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        if not record.ignores():
            record.clocks.sync_all_streams()
        record.note("sync", "synchronize")

    @property
    def Stream(self) -> type[Stream]:
        return Stream

    @property
    def Event(self) -> type[Event]:
        return Event

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, record.stream = record.stream, stream.number
        try:
            yield
        finally:
            record.stream = before

    def current_stream(self, device_index: int | None = None) -> Stream:
        return Stream(number=record.stream)

    def default_stream(self, device_index: int | None = None) -> Stream:
        return Stream(number=0)

    def on_accelerator(self, tensor: Tensor) -> bool:
        return backend.is_device(tensor)

    def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def unpin_memory(self, tensor: Tensor) -> None:
        pass


def install() -> FakeAccelerator:
    """Make the fake device the accelerator of torch and DeepSpeed. Once per process, before an engine is built."""
    from tests.fake_device.collectives import register

    backend.register()
    register()
    torch.autograd.set_multithreading_enabled(False)  # an error in a thread of the device would end the process
    accelerator = FakeAccelerator()
    set_accelerator(accelerator)
    torch.fake.Stream, torch.fake.Event = Stream, Event  # type: ignore[attr-defined]
    return accelerator
