"""What ran on the fake device: which stream touched which bytes, and when the host waited.

Clocks of streams, events and the host are those of torch's sanitizer (`torch.cuda._sanitizer`). Accesses are kept by
range of bytes, since ZeRO's flat buffers are used in part by several streams at the same time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations

ROOT = Path(__file__).parents[2]
OWNERS = ("allinone_ds", "benchmarks", "tests", "deepspeed", "transformers", "torchvision", "torchmetrics", "scipy",
          "accelerate", "torchjd", "pytorch_metric_learning")  # fmt: skip
"""Packages that an event can belong to: the one whose code called torch."""


class Place(NamedTuple):
    """The innermost line of code outside of torch."""

    owner: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Finding(NamedTuple):
    """Something that a GPU program should not do.

    Args:
        kind: "race", "sync", "copy" (of memory that is not pinned), or "freed" (memory used again too early).
        what: the operation.
        place: where it was called.
        other: of "race" and "freed", the earlier access: operation and place.
    """

    kind: str
    what: str
    place: Place
    other: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.place}{f', unordered after {self.other}' if self.other else ''}"


@dataclass(frozen=True)
class _Access:
    start: int
    end: int
    writes: bool
    stream: int
    number: int
    what: str
    place: Place


class Record:
    """Accesses, waits and copies on one device, since the last `clear`."""

    def __init__(self) -> None:
        self.clocks = StreamSynchronizations()
        self.findings: list[Finding] = []
        self.stream = 0
        self.deaf_to = ""  # a package whose waits have no effect, to see what they are for
        self._owners: dict[int, int] = {}  # storage -> the stream that its memory belongs to
        self._recorded: dict[int, set[int]] = {}  # storage -> streams of `record_stream`
        self._accesses: dict[int, list[_Access]] = {}
        self._free: dict[int, dict[int, _Access]] = {}  # stream -> the last uses of its free memory, by their stream
        self._before: dict[int, list[_Access]] = {}  # new storage -> those uses
        self._pending: dict[int, list[_Access]] = {}  # storage on the host -> copies of its bytes that may still run
        self._number = 0

    def launch(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Record a kernel on the current stream."""
        place = caller()
        self._number += 1
        self.clocks.update_seq_num(self.stream, self._number)
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._access(tensor, is_write, what, place)

    def wait(self, what: str) -> None:
        """Record that the host waited for everything on the current stream."""
        self.clocks.all_streams_wait_for_stream(self.stream)
        self.note("sync", what)

    def copies(self, host: Tensor, writes: bool) -> None:
        """Record a copy to (`writes`) or from page-locked memory, which the host does not wait for."""
        storage, start, end = extent(host)
        access = _Access(start, end, writes, self.stream, self._number, "copy", caller())
        self._pending.setdefault(storage, []).append(access)

    def host_uses(self, tensor: Tensor, writes: bool, what: str) -> None:
        """Report a use of memory on the host while a copy of it may still run."""
        storage, start, end = extent(tensor)
        running = [a for a in self._pending.get(storage, ()) if a.number > self.clocks.host_sync_state[a.stream]]
        for access in running:
            if access.start < end and start < access.end and (writes or access.writes):
                self.findings.append(Finding("race", what, caller(), f"copy at {access.place}"))
        self._pending[storage] = running

    def note(self, kind: str, what: str) -> None:
        """Record a finding at the line that is running now."""
        self.findings.append(Finding(kind, what, caller()))

    def ignores(self) -> bool:
        """Return whether a wait that is asked for now has no effect."""
        return bool(self.deaf_to) and caller().owner == self.deaf_to

    def clear(self) -> None:
        """Forget findings; the clocks go on."""
        self.findings = []

    def waits(self, owner: str = "allinone_ds") -> Counter[str]:
        """Return place -> number of times that the code of a package made the host wait."""
        return Counter(f.place.file for f in self.findings if f.kind == "sync" and f.place.owner == owner)

    def disorder(self) -> list[str]:
        """Return, once each, findings other than waits, in which the code of allinone_ds has a part."""
        return sorted({str(f) for f in self.findings if f.kind != "sync" and "allinone_ds/" in str(f)})

    def allocated(self, storage: int) -> None:
        """Record a new piece of memory, which the current stream owns; it may be any that the stream had before."""
        self._accesses[storage], self._owners[storage] = [], self.stream
        self._before[storage] = list(self._free.get(self.stream, {}).values())
        self._recorded.pop(storage, None)

    def freed(self, storage: int) -> None:
        """Give memory back to the stream that owns it, which does not wait for other streams that still use it."""
        own, known = self._owners.pop(storage, 0), self._recorded.pop(storage, set())
        for access in self._accesses.pop(storage, ()):
            last = self._free.setdefault(own, {})
            if access.stream not in known and (access.stream not in last or last[access.stream].number < access.number):
                last[access.stream] = access
        self._before.pop(storage, None)

    def used_by(self, storage: int, stream: int) -> None:
        """Let memory wait for a stream before its owner may have it again (`record_stream`)."""
        self._recorded.setdefault(storage, set()).add(stream)

    def _access(self, tensor: Tensor, writes: bool, what: str, place: Place) -> None:
        storage, start, end = extent(tensor)
        if start == end:
            return
        for old in self._before.pop(storage, ()):
            if not self._is_before(old, self.stream):
                self.findings.append(Finding("freed", what, place, f"{old.what} at {old.place}"))
        kept, access = [], _Access(start, end, writes, self.stream, self._number, what, place)
        for other in self._accesses.setdefault(storage, []):
            overlaps = other.start < end and start < other.end and (writes or other.writes)
            ordered = self._is_before(other, self.stream)
            if overlaps and not ordered:
                self.findings.append(Finding("race", what, place, f"{other.what} at {other.place}"))
            inside = start <= other.start and other.end <= end and (writes or not other.writes)
            if not (inside and (ordered or writes)):
                kept.append(other)
        kept.append(access)
        self._accesses[storage] = kept

    def _is_before(self, access: _Access, stream: int) -> bool:
        return self.clocks.is_ordered_after(stream, access.number, access.stream)


def extent(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of a tensor, and the range of bytes that its elements lie in."""
    storage = tensor.untyped_storage()._cdata
    if not tensor.numel():
        return storage, 0, 0
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, start, start + (last + 1) * size


def caller() -> Place:
    """Return the innermost line of one of `OWNERS`."""
    for file, line in _frames():
        for owner in OWNERS:
            if f"/{owner}/" in file and "/fake_device/" not in file:
                return Place(owner, file[file.rindex(f"/{owner}/") + 1 :], line)
    return Place("", "", 0)


def _frames() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


record = Record()
"""Of the one device of this process."""
