"""What is recognised in tar files of the webdataset format."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import DataError
from allinone_ds.init.first_run import write_first_run
from allinone_ds.init.recognise import recognise
from tests.init.layouts import (
    SIZE,
    add_member,
    box,
    boxes_of,
    class_id,
    class_map,
    file_of,
    folders_plain,
    picture,
    tar_boxes,
    tar_classes,
    tar_maps,
    write_tar,
)


def only(root: Path):
    [task] = recognise(root).values()
    return task


def test_shards_are_named_as_a_range_or_a_pattern_of_exactly_these(tmp_path: Path) -> None:
    for name, write in (("a", tar_classes), ("b", tar_boxes), ("c", tar_maps)):
        write(tmp_path / name)
    classes, boxes, maps = (only(tmp_path / name) for name in "abc")
    assert classes.train == {"format": "webdataset", "shards": "train-{000000..000001}.tar", "kind": "classification"}
    assert classes.test is not None and classes.test["shards"] == "val-000000.tar"
    assert boxes.train["shards"] == "shards/*.tar" and boxes.test is None
    assert boxes.train["columns"] == {"objects": "annotations", "category": "category_id"}
    assert maps.train["shards"] == "train/0.tar" and maps.train["columns"] == {"label_map": "seg.png"}
    write_tar(tmp_path / "d" / "train-3.tar", 2, 0, class_id)
    write_tar(tmp_path / "d" / "train-7.tar", 2, 9, class_id)
    assert only(tmp_path / "d").train["shards"] == "train-*.tar"
    for name in ("x", "y", "val"):
        write_tar(tmp_path / "e" / f"{name}.tar", 2, ord(name[0]), class_id)
    task = only(tmp_path / "e")
    assert task.train["shards"] == ["x.tar", "y.tar"] and task.test is not None and task.test["shards"] == "val.tar"


def test_several_labels_of_a_sample_are_a_joint_group(tmp_path: Path) -> None:
    def depth(i: int) -> tuple[str, bytes]:
        file = io.BytesIO()
        np.save(file, np.full(SIZE, 1.5 + i, dtype=np.float32))
        return "depth.npy", file.getvalue()

    write_tar(tmp_path / "rooms" / "0.tar", 5, 0, class_id, class_map, boxes_of, depth)
    found = recognise(tmp_path / "rooms")
    assert list(found) == ["rooms_classification", "rooms_detection", "rooms_depth", "rooms_segmentation"]
    assert found["rooms_depth"].train["columns"] == {"map": "depth.npy"}
    first = write_first_run([tmp_path / "rooms"], tmp_path / "run.yaml", gpu=False)
    [group] = first.groups.values()
    assert group.tasks == list(found) and group.samples == (4, 1) and first.problems == []
    assert group.train["labels"]["rooms_depth"]["format"] == "webdataset" and "images" not in group.train


def test_names_of_classes_and_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", 4, 0, lambda i: ("txt", ("pug", "boxer")[i % 2].encode()))
    assert only(tmp_path / "a").train["columns"] == {"label": "txt"}
    write_tar(tmp_path / "b" / "0.tar", 4, 0, lambda i: ("txt", f"a picture of {i} dogs".encode()))
    with pytest.raises(DataError, match=r"0\.tar and other tar files are read, but their columns \(jpg, txt\) fit no"):
        recognise(tmp_path / "b")
    write_tar(tmp_path / "c" / "0.tar", 4, 0, lambda i: ("json", json.dumps({"label": i % 3, "width": 80}).encode()))
    task = only(tmp_path / "c")
    assert task.train["columns"] == {"label": "label"} and task.classes == ["class_0", "class_1", "class_2"]
    assert any("class ids without names" in note for note in task.notes)
    write_tar(tmp_path / "d" / "0.tar", 4, 0, lambda i: ("cls", ("pug", "boxer")[i % 2].encode()))
    assert open_source(TypeAdapter(Source).validate_python(only(tmp_path / "d").train), tmp_path / "d").classes == [
        "boxer",
        "pug",
    ]


def test_flags_in_json_are_attributes(tmp_path: Path) -> None:
    def flags(i: int) -> tuple[str, bytes]:
        return "json", json.dumps({"smiles": i % 2, "hat": 1 - 2 * (i % 2), "id": 100 + i}).encode()

    write_tar(tmp_path / "0.tar", 4, 0, flags)
    task = only(tmp_path)
    assert (task.kind, task.train["columns"]) == ("attributes", {"attributes": ["smiles", "hat"]})


def test_tar_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "n01440764.tar", 4, 0)
    with pytest.raises(DataError, match=r"n01440764\.tar has images without a class, boxes or a map beside them"):
        recognise(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed; .*unpack them to \.tar"):
        recognise(tmp_path / "b")
    write_tar(tmp_path / "c" / "0.tar", 4, 0, class_id)
    data = (tmp_path / "c" / "0.tar").read_bytes()
    (tmp_path / "c" / "0.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=re.escape("0.tar: ends in the middle of")):
        recognise(tmp_path / "c")


def test_an_archive_beside_what_was_unpacked_is_left_alone(tmp_path: Path) -> None:
    folders_plain(tmp_path)
    with tarfile.open(tmp_path / "PetImages.tar", "w") as archive:
        for i in range(3):
            add_member(archive, f"PetImages/Cat/p{i}.jpg", file_of(picture(i)))
    assert only(tmp_path).train == {"format": "class_folders", "images": "PetImages"}
    assert not (tmp_path / "PetImages.tar.index.npz").exists()


def test_boxes_of_corners_are_told_from_sizes(tmp_path: Path) -> None:
    def corners(i: int) -> tuple[str, bytes]:
        x, y, w, h = box(i)
        bbox = [[x + 40, y + 30, x + 40 + w, y + 30 + h]]
        return "json", json.dumps({"objects": {"bbox": bbox, "category": ["cat"]}}).encode()

    write_tar(tmp_path / "0.tar", 4, 0, corners)
    task = only(tmp_path)
    assert task.train["bbox_format"] == "pascal" and task.classes == ["cat"]
