"""`read_members` finds what Python's `tarfile` finds, and refuses files that are damaged or not complete."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest

from allinone_ds.data.formats.rows.tar_members import read_members
from allinone_ds.errors import DataError

NAMES = ["a.jpg", "./b/c.json", "ü.png", "caf\udce9.cls", "folder/" * 20 + "deep.jpg", "n" * 180 + ".txt", "z.npy"]
CONTENTS = [b"", b"x", b"y" * 511, b"z" * 512, b"w" * 513, b"v" * 1024, b"u" * 5000]


def write(path: Path, form: int = tarfile.PAX_FORMAT, mtime: float = 0) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for number, (name, content) in enumerate(zip(NAMES, CONTENTS, strict=True)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime  # type: ignore[assignment]
            archive.addfile(member, io.BytesIO(content))
            other = tarfile.TarInfo(f"other_{number}")
            other.type = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 3]
            other.linkname = "" if number % 3 == 0 else ("a.jpg" if number < 4 else "t" * 150)
            archive.addfile(other)
    return path


@pytest.mark.parametrize(
    ("form", "mtime"), [(tarfile.PAX_FORMAT, 0), (tarfile.PAX_FORMAT, 1.5), (tarfile.GNU_FORMAT, 0)]
)
def test_the_members_are_those_of_tarfile(tmp_path: Path, form: int, mtime: float) -> None:
    path = write(tmp_path / "a.tar", form, mtime)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    found = list(read_members(path))
    assert [(m.name, m.start, m.size) for m in found] == expected and len(found) == len(NAMES)
    assert [m.beginning for m in found] == [content[:512] for content in CONTENTS]


def test_a_long_name_in_two_parts(tmp_path: Path) -> None:
    name = "f" * 90 + "/" + "g" * 60 + ".jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name))
    assert [member.name for member in read_members(tmp_path / "a.tar")] == [name]


def sealed(header: bytearray) -> bytes:
    """A header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_sizes_may_be_binary(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.tar").read_bytes())
    header = data[:512]
    header[124:136] = struct.pack(">BxxxQ", 0x80, 0)
    data[:512] = sealed(header)
    (tmp_path / "a.tar").write_bytes(data)
    assert [member.name for member in read_members(tmp_path / "a.tar")] == NAMES


def test_files_that_are_not_complete_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    data = path.read_bytes()
    *_, last = read_members(path)
    cases = {
        "ends in the middle of z.npy": data[: last.start + 100],
        "without the mark that ends a tar file": data[: last.start + 10 * 512],
        "is damaged at byte": data[:512] + b"x" * 512 + data[1024:],
        "has files after the mark that ends": data + data,
        "a.tar: is no tar file$": b"x" * 2000,
    }
    for says, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            list(read_members(path))


def test_files_with_gaps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (tarfile.GNUTYPE_SPARSE, {"GNU.sparse.major": "1"}):
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("a.jpg")
            if isinstance(content, dict):
                member.pax_headers = content
            else:
                member.type = content
            archive.addfile(member)
        with pytest.raises(DataError, match="stored with gaps left out"):
            list(read_members(path))
