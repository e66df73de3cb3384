"""`Texts`, and that no dataset keeps objects of its own for every sample, which workers would copy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.combination import Split, combine
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.joint.sources import GroupSource, JointSource
from allinone_ds.data.sources import open_source
from tests.data.formats.test_webdataset import numbered, write_shard
from tests.data.tiny_sets import source

NAMES = ["a.jpg", "", "ä/日本.png", "caf\udce9.jpg", "\ud800", "x" * 300]


def test_texts_are_a_sequence_of_what_they_were_made_of() -> None:
    for texts in (Texts(NAMES), pickle.loads(pickle.dumps(Texts(iter(NAMES))))):
        assert list(texts) == NAMES and [texts[i] for i in range(len(texts))] == NAMES
        assert texts[-1] == NAMES[-1] and texts[1:5:2] == NAMES[1:5:2] and NAMES[2] in texts
        for place in (len(NAMES), -len(NAMES) - 1):
            with pytest.raises(IndexError):
                texts[place]
    assert len(Texts([])) == 0 and not Texts([]) and list(Texts([])) == []


def test_class_names_are_no_cells_of_a_table() -> None:
    cells = ["".join(("c", "at")), "".join(("d", "og"))]
    classes = ClassifiedDataset("pets", Path("/"), ["1.png"], [0], cells).classes
    assert classes == cells and all(name is not cell for name, cell in zip(classes, cells, strict=True))


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"picture_{i:06}.png" for i in range(count)]
    for name in names:
        Image.new("RGB", (4, 3)).save(folder / name)
    return names


def coco(root: Path, count: int, kind: str = "detection") -> dict[str, Any]:
    names = write_pictures(root / "images", count)
    more = {"segmentation": [[0.5, 0, 3, 0, 3, 2.25]], "keypoints": [1.0, 1.5, 2]}
    content = {
        "images": [{"id": 1000 + i, "file_name": name, "height": 3, "width": 4} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": 1000 + i, "category_id": 1, "bbox": [0, 0, 3.5, 2], "area": 7, **more}
            for i in range(count)
        ],
        "categories": [{"id": 1, "name": "cat", "keypoints": ["nose"]}],
    }
    (root / "boxes.json").write_text(json.dumps(content))
    return {"format": "coco", "images": "images", "annotations": "boxes.json", "kind": kind}


def image_list(root: Path, count: int) -> dict[str, Any]:
    names = write_pictures(root / "images", count)
    (root / "list.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)))
    return {"format": "image_list", "images": "images", "list": "list.txt"}


def class_folders(root: Path, count: int) -> dict[str, Any]:
    for name in ("cat", "dog"):
        write_pictures(root / name, count // 2)
    return {"format": "class_folders", "images": "."}


def image_table(root: Path, count: int, kind: str = "classification") -> dict[str, Any]:
    names = write_pictures(root / "images", count)
    rows = [f"{name},{'ab'[i % 2]},{i / 7}\n" for i, name in enumerate(names)]
    (root / "table.csv").write_text("".join(["image,label,value\n", *rows]))
    return {"format": "image_table", "images": "images", "table": "table.csv", "kind": kind}


def label_maps(root: Path, count: int) -> dict[str, Any]:
    for i, name in enumerate(write_pictures(root / "images", count)):
        (root / "maps").mkdir(exist_ok=True)
        Image.fromarray(np.full((3, 4), i % 2, dtype=np.uint8)).save(root / "maps" / name)
    return {"format": "label_maps", "images": "images", "label_maps": "maps", "classes": ["ground", "sky"]}


def dense_maps(root: Path, count: int) -> dict[str, Any]:
    label_maps(root, count)
    return {"format": "dense_maps", "kind": "saliency", "images": "images", "maps": "maps"}


def yolo(root: Path, count: int) -> dict[str, Any]:
    for i, name in enumerate(write_pictures(root / "images", count)):
        (root / "labels").mkdir(exist_ok=True)
        lines = "0 0.5 0.5 0.25 0.5\n" * (i % 2) + "1 0 0 0.5 0.25 0.5 1\n" * (i % 3 > 0)
        (root / "labels" / name).with_suffix(".txt").write_text(lines)
    return {"format": "yolo", "images": "images", "classes": ["cat", "dog"]}


def webdataset(root: Path, count: int) -> dict[str, Any]:
    write_shard(root / "a.tar", numbered(0, count))
    return {"format": "webdataset", "shards": "*.tar", "kind": "classification", "classes": ["cat", "dog"]}


FORMATS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "coco": coco,
    "coco_instances": lambda root, count: coco(root, count, "instances"),
    "coco_keypoints": lambda root, count: coco(root, count, "keypoints"),
    "image_list": image_list,
    "class_folders": class_folders,
    "image_table": image_table,
    "image_table_regression": lambda root, count: image_table(root, count, "regression"),
    "label_maps": label_maps,
    "dense_maps": dense_maps,
    "yolo": yolo,
    "webdataset": webdataset,
}


def objects_of(dataset: SampleDataset) -> int:
    """Count the Python objects that a dataset keeps; one that is used several times counts once."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [dataset]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen[id(current)] = current
        if isinstance(current, dict):
            waiting += [*current, *current.values()]
        elif isinstance(current, list | tuple | set | frozenset):
            waiting += current
        elif type(current).__module__.startswith("allinone_ds.") and hasattr(current, "__dict__"):
            waiting += vars(current).values()
    return len(seen)


def open_few_and_many(tmp_path: Path, make: Callable[[Path], SampleDataset]) -> list[SampleDataset]:
    opened = []
    for count in (6, 24):
        root = tmp_path / str(count)
        root.mkdir()
        opened.append(make(root))
    return opened


@pytest.mark.parametrize("name", FORMATS)
def test_a_dataset_keeps_no_object_per_sample(name: str, tmp_path: Path) -> None:
    few, many = open_few_and_many(tmp_path, lambda root: open_source(source(FORMATS[name](root, int(root.name))), root))
    assert (len(few), len(many)) == (6, 24) and objects_of(many) == objects_of(few)
    for index in (0, 23, 7):
        sample = many[index]
        assert sample["path"] == many.path(index) and sample["image"].shape[0] == 3


def test_neither_do_combinations_and_joint_groups(tmp_path: Path) -> None:
    def joint(root: Path) -> SampleDataset:
        maps = {"format": "dense_maps", "kind": "saliency", "images": "images", "maps": "maps"}
        labels = {"seg": label_maps(root, int(root.name)), "saliency": maps}
        given = TypeAdapter(JointSource).validate_python({"format": "joint", "labels": labels})
        split = Split(test=0.5)
        group = GroupSource(group="g", tasks=["seg", "saliency"], sources=[given], split=split)
        return open_source(group, root)

    def combined(root: Path) -> SampleDataset:
        return open_source(combine(source(image_list(root, int(root.name))), split=Split(test=0.5)), root)

    for number, make in enumerate((joint, combined)):
        few, many = open_few_and_many(_made(tmp_path / str(number)), make)
        assert 0 < len(few) < len(many) and objects_of(many) == objects_of(few)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
