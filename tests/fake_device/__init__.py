"""An accelerator with streams that exists in Python only: tensors in host memory, and a record of what ran when.

`install` makes it the accelerator of torch and of DeepSpeed in this process. Every kernel, copy and collective
operation is then recorded with the stream that it ran on, so that accesses without an order, waits of the host for the
device and copies of memory that is not pinned are found without a GPU.
"""

from __future__ import annotations

from tests.fake_device.accelerator import FakeAccelerator, install
from tests.fake_device.backend import WatchedHost
from tests.fake_device.record import Finding, Record, record

__all__ = ["FakeAccelerator", "Finding", "Record", "WatchedHost", "install", "record"]
