"""WebDatasetSource, and the table of its tar files."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from allinone_ds.data.formats.rows import tar_table
from allinone_ds.data.formats.rows.tar_table import TarTable
from allinone_ds.data.formats.rows.webdataset import WebDatasetSource, find_shards
from allinone_ds.data.sources import open_source
from allinone_ds.errors import BrokenSample, DataError


def picture(value: int, ending: str = "png", mode: str = "RGB") -> bytes:
    """Return the file of an image 6 wide and 4 high, all of one value."""
    file = io.BytesIO()
    Image.new(mode, (6, 4), (value,) * 3 if mode == "RGB" else value).save(file, ending)
    return file.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes | str | Any]) -> Path:
    """Write a tar file; a member that is neither bytes nor text is written as JSON."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes | str) else json.dumps(content)
            raw = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def open_shards(root: Path, kind: str, classes: Sequence[str] | None = None, **keys: Any) -> Any:
    names = {} if classes is None else {"classes": list(classes)}
    given = {"format": "webdataset", "shards": "*.tar", "kind": kind, **names, **keys}
    return open_source(WebDatasetSource.model_validate(given), root)


def numbered(first: int, count: int) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for number in range(first, first + count):
        members |= {f"{number:04}.png": picture(number), f"{number:04}.cls": str(number % 2)}
    return members


def test_samples_of_several_shards_are_read_in_any_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", numbered(3, 4))
    write_shard(tmp_path / "a.tar", numbered(0, 3))
    dataset = open_shards(tmp_path, "classification", ["even", "odd"])
    assert len(dataset) == 7 and list(dataset.labels) == [0, 1, 0, 1, 0, 1, 0]
    for index in (6, 0, 3, 2, 5):
        sample = dataset[index]
        assert int(sample["image"][0, 0, 0]) == index and sample["label"] == index % 2
    assert dataset.path(4) == f"{tmp_path / 'b.tar'}#0004"
    assert Image.open(io.BytesIO(dataset.encoded(5))).getpixel((0, 0)) == (5, 5, 5)
    assert [int(pickle.loads(pickle.dumps(dataset))[k]["image"].max()) for k in (6, 1)] == [6, 1]
    loaded = DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=lambda sample: int(sample["image"].max()))
    assert list(loaded) == list(range(7))


def test_every_kind_reads_its_columns(tmp_path: Path) -> None:
    objects = {"bbox": [[1, 1, 2, 2]], "category": [1], "keypoints": [[1, 1, 2, 3, 3, 1]]}
    members = {
        "x.jpg": picture(200, "jpeg"), "x.png": picture(1, mode="L"), "x.npy": _npy(np.full((4, 6), 2.5, np.float32)),
        "x.json": {"objects": objects, "sunny": 1, "indoor": 0, "price": 3.5},
    }  # fmt: skip
    write_shard(tmp_path / "a.tar", members)
    classes = ["cat", "dog"]
    found = open_shards(tmp_path, "detection", classes)[0]
    assert found["boxes"].tolist() == [[1, 1, 3, 3]] and found["labels"].tolist() == [1]
    assert int(found["image"][0, 0, 0]) > 190, "of two images of a sample the jpg is the image"
    assert open_shards(tmp_path, "segmentation", classes)[0]["mask"].unique().tolist() == [1]
    depth = open_shards(tmp_path, "depth", columns={"map": "npy"})[0]["depth"]
    assert depth.shape == (4, 6) and float(depth[0, 0]) == 2.5
    attributes = open_shards(tmp_path, "attributes", columns={"attributes": ["sunny", "indoor"]})
    assert attributes.classes == ["sunny", "indoor"] and attributes[0]["attributes"].tolist() == [1, 0]
    assert open_shards(tmp_path, "regression", columns={"values": ["price"]})[0]["value"].tolist() == [3.5]
    assert open_shards(tmp_path, "keypoints", classes)[0]["keypoints"].shape == (1, 2, 2)


def test_classes_may_be_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"a.png": picture(0), "a.cls": "dog", "b.png": picture(1), "b.cls": "cat"})
    dataset = open_shards(tmp_path, "classification")
    assert dataset.classes == ["cat", "dog"] and list(dataset.labels) == [1, 0]


def test_the_index_is_written_once_and_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "a.tar", numbered(0, 3))
    open_shards(tmp_path, "classification", ["even", "odd"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(tar_table, "_scan", None)
        assert len(open_shards(tmp_path, "classification", ["even", "odd"])) == 3
    write_shard(shard, numbered(0, 5))
    assert len(open_shards(tmp_path, "classification", ["even", "odd"])) == 5
    (tmp_path / "a.tar.index.npz").write_bytes(b"broken")
    assert len(open_shards(tmp_path, "classification", ["even", "odd"])) == 5
    with monkeypatch.context() as patch:
        patch.setattr(tar_table, "atomic_path", _read_only)
        (tmp_path / "a.tar.index.npz").unlink()
        assert len(open_shards(tmp_path, "classification", ["even", "odd"])) == 5


def test_short_texts_are_in_the_index_and_need_no_look_at_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.tar", {**numbered(0, 3), "0002.txt": "last"})
    write_shard(tmp_path / "b.tar", {"x.png": picture(0), "x.cls": " 1 \n", "x.txt": "ö"})
    write_shard(tmp_path / "c.tar", {"y.png": picture(0), "y.cls": "0" * 65, "y.txt": "z\0"})
    table = TarTable(find_shards(tmp_path, "*.tar"))
    read: list[int] = []
    monkeypatch.setattr(TarTable, "_read", _counted(TarTable._read, read))
    for names in (["cls"], ["cls", "txt"], ["txt", "png"]):
        read.clear()
        columns = table.columns(names)
        assert {name: columns[name] for name in names} == {name: table[name] for name in names}
        assert columns == {name: [table[row].get(name) for row in range(5)] for name in names}
    assert table["cls"] == [0, 1, 0, 1, 0] and table["txt"] == [None, None, "last", "ö", "z\0"]
    read.clear()
    TarTable([tmp_path / "a.tar", tmp_path / "b.tar"])
    for_columns = len(read)
    open_shards(tmp_path, "classification", ["even", "odd"], shards=["a.tar", "b.tar"])
    assert len(read) == 2 * for_columns, "opening reads no label"
    read.clear()
    table.columns(["cls"])
    assert read == [4], "only a shard without short texts is read"


def _counted(function: Any, calls: list[int]) -> Any:
    def read(self: TarTable, shard: int, place: Any, index: int) -> bytes:
        calls.append(index)
        return function(self, shard, place, index)

    return read


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_table, "_OPEN", 2)
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", numbered(number, 1))
    table = TarTable(find_shards(tmp_path, "{0..3}.tar"))
    assert [table[k]["cls"] for k in (0, 1, 2, 3, 0, 2)] == [0, 1, 0, 1, 0, 0] and len(table._files) == 2


def test_ranges_of_numbers_keep_their_zeros(tmp_path: Path) -> None:
    for number in range(9, 12):
        write_shard(tmp_path / f"s-{number:03}.tar", numbered(0, 1))
    assert [path.name for path in find_shards(tmp_path, "s-{009..011}.tar")] == ["s-009.tar", "s-010.tar", "s-011.tar"]
    with pytest.raises(DataError, match=r"there is no .*s-012\.tar"):
        find_shards(tmp_path, "s-{009..012}.tar")
    with pytest.raises(DataError, match="there is no"):
        find_shards(tmp_path, "t-*.tar")
    with pytest.raises(DataError, match="is empty"):
        find_shards(tmp_path, "s-{011..009}.tar")
    with pytest.raises(DataError, match=r"s-010\.tar is named 2 times"):
        open_shards(tmp_path, "classification", ["even", "odd"], shards=["*.tar", "s-010.tar"])


def test_an_image_is_not_its_own_label_map(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"a.jpg": picture(1, "jpeg"), "a.png": picture(1, mode="L")})
    write_shard(tmp_path / "b.tar", {"b.png": picture(1, mode="L"), "b.seg.png": picture(0, mode="L")})
    with pytest.raises(DataError, match=r"b\.tar#b: 'png' is its only image.*columns\.label_map"):
        open_shards(tmp_path, "segmentation", ["cat", "dog"])
    columns = {"image": "png", "label_map": "seg.png"}
    dataset = open_shards(tmp_path, "segmentation", ["cat", "dog"], shards="b.tar", columns=columns)
    assert int(dataset[0]["mask"].max()) == 0 and int(dataset[0]["image"].max()) == 1


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "no samples"),
        ({"README": b"x"}, "no samples"),
        ({"a.png": picture(0), "b.png": picture(0), "a.cls": "1"}, "members of 'a' do not follow each other"),
        ({"a.cls": "1"}, "'image'"),
        ({"a.png": picture(0), "a.txt": "1"}, "columns.label = 'cls', which is not a column"),
        ({"a.png": picture(0), "a.cls": "7"}, "class 7 is not one of the 2 classes"),
    ],
)
def test_unusable_shards_are_one_clear_error(tmp_path: Path, members: dict[str, Any], says: str) -> None:
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=says):
        open_shards(tmp_path, "classification", ["even", "odd"])


def test_compressed_and_cut_off_files_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", numbered(0, 3))
    whole = shard.read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"a\.tar\.gz: is no tar file.*unpack them to \.tar"):
        open_shards(tmp_path, "classification", ["even", "odd"], shards="a.tar.gz")
    shard.write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"a\.tar.*ends after 700 bytes without the mark"):
        open_shards(tmp_path, "classification", ["even", "odd"])


def test_broken_samples_are_named(tmp_path: Path) -> None:
    members: dict[str, Any] = {"a.png": picture(0), "a.json": {"objects": {"bbox": [], "category": []}}}
    members |= {"b.png": picture(0), "b.json": {"objects": {"bbox": [[1, 1, 2, 2]], "category": [0]}}}
    members |= {"c.json": members["b.json"], "d.png": b"no image", "d.json": members["b.json"]}
    shard = write_shard(tmp_path / "a.tar", members)
    dataset = open_shards(tmp_path, "detection", ["cat"])
    assert len(dataset[0]["boxes"]) == 0 and len(dataset[1]["boxes"]) == 1
    for index, reason in ((2, "has no image"), (3, "not an image")):
        with pytest.raises(BrokenSample, match=reason) as raised:
            dataset[index]
        assert raised.value.path == f"{shard}#{'abcd'[index]}"
    write_shard(shard, {"a.png": picture(0), "a.json": "{broken"})
    with pytest.raises(BrokenSample, match=r"\.json cannot be read"):
        open_shards(tmp_path, "detection", ["cat"])


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _read_only(target: Path) -> Any:
    raise PermissionError(13, "Permission denied", str(target))
