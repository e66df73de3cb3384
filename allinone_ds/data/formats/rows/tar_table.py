"""Samples in tar files of the webdataset format, at any position: as a table with the methods of `datasets.Dataset`.

Members of a tar file with one name up to the first dot, one after another, are a sample; the rest of their names are
its columns. An index of a tar file has the place of every member, so that samples are read in any order and a run
resumes exactly. It is written beside the tar file, if the folder can be written to.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allinone_ds.atomic_file import atomic_path
from allinone_ds.data.formats.rows.tar_members import read_members
from allinone_ds.errors import BrokenSample, DataError

IMAGES = ("jpg", "jpeg", "webp", "png", "bmp", "tif", "tiff", "ppm")
"""Endings of the columns that are images."""
IMAGE = "image"
"""Column of the image of a sample: of its members with these endings the first."""
_NUMBERS = ("cls", "id", "index")
_KEPT = (*_NUMBERS, "txt")  # endings whose contents the index holds, where they are short
_SHORT = 64  # bytes
_LOOKED_AT = 100  # samples whose json says which columns there are
_OPEN = 64  # tar files that stay open


class ShardIndex(NamedTuple):
    """Where the N samples of one tar file are.

    Args:
        keys: names of the samples in UTF-8, (N,).
        endings: names of the E columns.
        places: first byte and length of each member, (N, E, 2) int64; length -1: the sample has no such member.
        texts: ending -> contents of the members with it, (N,), where all samples have one and all are short.
    """

    keys: NDArray[np.bytes_]
    endings: list[str]
    places: NDArray[np.int64]
    texts: Mapping[str, NDArray[np.bytes_]]


def read_index(shard: Path) -> ShardIndex:
    """Return the index of a tar file, and write it beside the file unless it is there.

    Args:
        shard: the tar file, not compressed.

    Raises:
        DataError: the file cannot be read, is compressed, or ends too early.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror or error}; correct 'shards'") from None
    stamp = np.array([status.st_size, status.st_mtime_ns])
    cache = shard.with_name(f"{shard.name}.index.npz")
    try:
        with np.load(cache) as saved:
            if (saved["stamp"] == stamp).all():
                texts = {ending: saved[f"text {ending}"] for ending in saved["texts"].tolist()}
                return ShardIndex(saved["keys"], saved["endings"].tolist(), saved["places"], texts)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    index = _scan(shard)
    try:
        with atomic_path(cache) as temporary, temporary.open("wb") as file:
            content: dict[str, Any] = {"stamp": stamp, "keys": index.keys, "places": index.places}
            content |= {"endings": np.array(index.endings, str), "texts": np.array(list(index.texts), str)}
            content |= {f"text {ending}": texts for ending, texts in index.texts.items()}
            np.savez(file, **content)
    except OSError:
        pass  # the folder is read-only: the next run scans again
    return index


def _scan(shard: Path) -> ShardIndex:
    keys: list[str] = []
    found: dict[str, array[int]] = defaultdict(lambda: array("q"))  # ending -> sample, start and size of each member
    texts: dict[str, list[bytes]] = defaultdict(list)
    for member in read_members(shard):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, ending = name.partition(".")
        if not stem or not ending:
            continue
        key = folder + slash + stem
        if not keys or keys[-1] != key:
            keys.append(key)
        ending = ending.lower()
        found[ending].extend((len(keys) - 1, member.start, member.size))
        if member.size <= _SHORT and ending.rpartition(".")[2] in _KEPT and b"\0" not in member.beginning:
            texts[ending].append(member.beginning)
    if len(set(keys)) != len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"{shard}: the members of '{twice}' do not follow each other; write the file sorted by name")
    endings = sorted(found)
    places = np.full((len(keys), len(endings), 2), -1, dtype=np.int64)
    whole = []
    for column, ending in enumerate(endings):
        members = np.array(found[ending]).reshape(-1, 3)
        places[members[:, 0], column] = members[:, 1:]
        if len(texts[ending]) == len(members) == len(keys) == len(np.unique(members[:, 0])):
            whole.append(ending)
    names = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    return ShardIndex(names, endings, places, {ending: np.array(texts[ending], dtype=np.bytes_) for ending in whole})


class TarTable:
    """The samples of several tar files, one after another, as rows.

    A cell of an image is {"bytes": its file, "path": None}, that of `.cls` or `.txt` a number or text, that of `.npy`
    an array. The keys of `.json` are columns of their own.

    Args:
        shards: the tar files.

    Raises:
        DataError: a file cannot be read, or no file has a sample.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        self._indices = [read_index(shard) for shard in shards]
        self._ends = np.cumsum([len(index.keys) for index in self._indices])
        self._files: dict[int, int] = {}  # number of the shard -> file descriptor, the one used last at the end
        self._columns: tuple[str, ...] | None = None
        self.features = self._find_features()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | str) -> Any:
        return self.columns([key])[key] if isinstance(key, str) else self._row(key, self._columns)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return the cells of columns, with one look at each sample, or none where the indices hold them."""
        cells: dict[str, list[Any]] = {name: [] for name in names}
        first = 0
        for index in self._indices:
            rows = range(first, first := first + len(index.keys))
            read = [name for name in names if name not in index.texts]
            for name in cells.keys() - {*read}:
                stored = zip(index.texts[name].tolist(), rows, strict=True)
                cells[name] += [self._decoded(name, content, row) for content, row in stored]
            for row in (self._row(r, read) for r in rows) if read else ():
                for name in read:
                    cells[name].append(row[name])
        return cells

    def select_columns(self, columns: str | Sequence[str]) -> TarTable:
        """Return the table with some of its columns; the others are not read."""
        columns = [columns] if isinstance(columns, str) else columns
        part = object.__new__(TarTable)
        part.__dict__ = {**self.__dict__, "_columns": tuple(columns)}
        part.features = {name: self.features[name] for name in columns}
        return part

    def cast_column(self, column: str, feature: Any) -> TarTable:
        """Return the table: its images are not decoded."""
        return self

    def path(self, index: int) -> str:
        """Return tar file and name of a sample."""
        shard, row = self._place(index)
        return f"{self._shards[shard]}#{self._indices[shard].keys[row].decode('utf-8', 'surrogateescape')}"

    def only_image(self, ending: str) -> str | None:
        """Return the path of the first sample whose column `IMAGE` is its member with this ending, or None."""
        before = IMAGES[: IMAGES.index(ending)] if ending in IMAGES else ()
        first = 0
        for endings, places in ((index.endings, index.places) for index in self._indices):
            if ending in IMAGES and ending in endings:
                there = places[:, :, 1] >= 0
                earlier = [endings.index(other) for other in before if other in endings]
                alone = np.flatnonzero(there[:, endings.index(ending)] & ~there[:, earlier].any(1))
                if len(alone):
                    return self.path(first + int(alone[0]))
            first += len(places)
        return None

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _row(self, index: int, columns: Sequence[str] | None) -> dict[str, Any]:
        """Return the cells of a sample, of some columns or of all."""
        shard, row = self._place(index)
        endings, places = self._indices[shard].endings, self._indices[shard].places[row].tolist()
        members = {ending: place for ending, place in zip(endings, places, strict=True) if place[1] >= 0}
        image = next((ending for ending in IMAGES if ending in members), None)
        if image is not None:
            members.setdefault(IMAGE, members[image])
        wanted = members if columns is None else columns
        cells: dict[str, Any] = dict.fromkeys(wanted)
        for name in wanted:
            if name in members:
                kind = image if name == IMAGE and image is not None else name
                cells[name] = self._decoded(str(kind), self._read(shard, members[name], index), index)
        if "json" in members and (columns is None or not members.keys() >= {*columns}):
            content = cells.get("json") or self._decoded("json", self._read(shard, members["json"], index), index)
            inside = content if isinstance(content, dict) else {}
            cells.update({n: v for n, v in inside.items() if n not in members and (columns is None or n in cells)})
        return cells

    def _read(self, shard: int, place: Sequence[int], index: int) -> bytes:
        start, length = place
        try:
            descriptor = self._files.pop(shard, None)
            if descriptor is None:
                descriptor = os.open(self._shards[shard], os.O_RDONLY)
                if len(self._files) >= _OPEN:
                    os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = descriptor
            content = os.pread(descriptor, length, start)
        except OSError as error:
            raise BrokenSample(self.path(index), f"cannot be read: {error.strerror or error}") from None
        if len(content) != length:
            raise BrokenSample(self.path(index), "the tar file has changed and ends too early; copy it again")
        return content

    def _decoded(self, ending: str, content: bytes, index: int) -> Any:
        last = ending.rpartition(".")[2]
        if last in IMAGES:
            return {"bytes": content, "path": None}
        try:
            if last == "npy":
                return np.load(io.BytesIO(content), allow_pickle=False)
            text = content.decode()
            if last == "json":
                return json.loads(text)
            if last in _NUMBERS:
                return int(text) if text.strip().lstrip("-").isdigit() else text.strip()
        except ValueError as error:
            raise BrokenSample(self.path(index), f".{ending} cannot be read: {error}") from None
        return text.strip()

    def _find_features(self) -> dict[str, Any]:
        """Return column -> type, as `datasets` has them, from the endings and the first samples."""
        import datasets
        import pyarrow

        if not len(self):
            raise DataError(f"{self._shards[0]}: has no samples; a sample is a file NAME.ENDING")
        rows = [self._row(index, None) for index in range(min(len(self), _LOOKED_AT))]
        endings = {ending for index in self._indices for ending in index.endings}
        image = [IMAGE] if endings & {*IMAGES} else []
        names = dict.fromkeys([*image, *sorted(endings), *(name for row in rows for name in row)])
        features: dict[str, Any] = {}
        for name in names:
            if name in image or name.rpartition(".")[2] in IMAGES:
                features[name] = datasets.Image()
            elif name.rpartition(".")[2] == "npy":
                features[name] = datasets.Value("binary")
            else:
                try:
                    schema = pyarrow.table({name: [row.get(name) for row in rows]}).schema
                except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # values of several types
                    continue
                features[name] = datasets.Features.from_arrow_schema(schema)[name]
        return features
