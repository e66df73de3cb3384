"""The files in a tar file, from its headers alone: an index of a million files takes seconds."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from allinone_ds.errors import DataError

_BLOCK = 512  # bytes: headers have this size, and contents end at multiples of it
_CHECKSUM = slice(148, 156)
_MODULUS = 65521  # of adler32, whose lower half is 1 + the sum of the bytes
_FILES, _WITH_GAPS = b"0\x007", ord("S")
_WITHOUT_CONTENT = b"123456"  # links, devices and folders
_EXTENDED = b"xgLK"  # what a header cannot hold of the next member
_RECORD = 20 * _BLOCK  # the size that writers round a file up to


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    start: int
    """Where its content begins, in bytes."""
    size: int
    """Number of bytes."""
    beginning: bytes
    """Its content, if it has at most 512 bytes; else the first of them."""


def read_members(shard: Path) -> Iterator[Member]:
    """Yield the files in a tar file in the order in which it has them.

    Args:
        shard: the file, not compressed, in the format of POSIX or GNU.

    Raises:
        DataError: it is no tar file, is damaged, or is not complete.
        OSError: it cannot be read.
    """
    with shard.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        end = os.fstat(descriptor).st_size
        position = 0
        given: dict[str, Any] = {}  # name and size of the next member, where headers of their own have them
        while True:
            block = os.pread(descriptor, 2 * _BLOCK, position)
            header, content = block[:_BLOCK], block[_BLOCK:]
            if header == bytes(_BLOCK):
                _require_end(shard, os.pread(descriptor, 2 * _RECORD, position))
                return
            if len(header) < _BLOCK and position:
                raise DataError(f"{shard}: ends after {end} bytes without the mark that ends a tar file; copy it again")
            kind, start, size = header[156], position + _BLOCK, _size(shard, header, position)
            if kind in _EXTENDED:
                content = os.pread(descriptor, size, start) if size > _BLOCK else content[:size]
                given |= _given(shard, content, kind)
            else:
                size = given.get("size", size)
            if kind in _WITHOUT_CONTENT:
                size = 0
            name = given.get("name") or _name(header)
            if start + size > end:
                raise DataError(f"{shard}: ends in the middle of {name}; copy it again")
            position = start + -(-size // _BLOCK) * _BLOCK
            if kind in _EXTENDED:
                continue
            if kind == _WITH_GAPS:
                raise DataError(f"{shard}: {name} is stored with gaps left out; write it without them")
            if kind in _FILES and not name.endswith("/"):
                yield Member(name, start, size, content[:size])
            given = {}


def _require_end(shard: Path, rest: bytes) -> None:
    """Raise a `DataError` if something follows the mark that ends a tar file."""
    if rest.strip(b"\0"):
        raise DataError(
            f"{shard}: has files after the mark that ends a tar file, as several put together have; unpack them with "
            "`tar --ignore-zeros -x` and write one file, or give them as several"
        )


def _size(shard: Path, header: bytes, position: int) -> int:
    """Return the size of a member's content, after its header was checked."""
    try:
        if len(header) < _BLOCK:
            raise ValueError("too short")
        stated = int(_text(header[_CHECKSUM]).strip() or "0", 8)
        summed = zlib.adler32(header[: _CHECKSUM.start] + b" " * 8 + header[_CHECKSUM.stop :]) & 0xFFFF
        if summed != (1 + stated) % _MODULUS:
            raise ValueError("wrong checksum")
        field = header[124:136]
        return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(_text(field).strip() or "0", 8)
    except ValueError as error:
        if position:
            raise DataError(f"{shard}: is damaged at byte {position} ({error}); copy or write it again") from None
        packed = " (compressed files cannot be read at any position: unpack them to .tar)"
        raise DataError(f"{shard}: is no tar file{packed if shard.suffix != '.tar' else ''}") from None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    folder = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{folder}/{name}" if folder else name


def _given(shard: Path, content: bytes, kind: int) -> dict[str, Any]:
    """Return `name` and `size` of the next member where an extended header gives them."""
    if kind == ord("L"):
        return {"name": _text(content)}
    given: dict[str, Any] = {}
    while content and kind == ord("x"):
        number, _, rest = content.partition(b" ")
        length = int(number) if number.isdigit() else 0
        key, _, value = rest[: max(length - len(number) - 2, 0)].partition(b"=")
        if not length or (key == b"size" and not value.isdigit()):
            raise DataError(f"{shard}: has an extended header that cannot be read; write it again")
        if key.startswith(b"GNU.sparse"):
            raise DataError(f"{shard}: has a file that is stored with gaps left out; write it without them")
        if key == b"path":
            given["name"] = _text(value)
        elif key == b"size":
            given["size"] = int(value)
        content = content[length:]
    return given


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
