"""Data sets of a million small files in the formats that can be so large, made of hard links to a few images."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 32  # pixels of an image
CLASSES = [f"class_{k:04}" for k in range(1000)]
_LINKS = 50_000  # to one file: ext4 allows 65,000
_SHARD = 10_000  # samples of a tar file
_TASKS = 40


def encoded(seed: int, kind: str) -> bytes:
    """Return a small JPEG of soft colours, or a png of class ids."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    if kind == "PNG":
        picture = Image.fromarray(rng.integers(0, 2, (4, 4), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def names_of(count: int, suffix: str = ".jpg") -> Iterator[str]:
    """Yield the files of a set, a thousand per folder."""
    return (f"{CLASSES[i // 1000 % 1000]}/image_{i:08}{suffix}" for i in range(count))


def write_files(folder: Path, count: int, kind: str = "JPEG") -> None:
    """Write files below a folder unless they are there."""
    if folder.exists():
        return
    suffix = {"JPEG": ".jpg", "PNG": ".png"}[kind]
    originals = []
    for k in range(max(16, count // _LINKS + 1)):
        originals.append(folder.parent / f"original_{folder.name}_{k}{suffix}")
        originals[-1].write_bytes(encoded(k, kind))
    for i, name in enumerate(names_of(count, suffix)):
        if i % 1000 == 0:
            (folder / name).parent.mkdir(parents=True)
        os.link(originals[i % len(originals)], folder / name)


def _image_list(root: Path, count: int) -> dict[str, Any]:
    write_files(root / "images", count)
    rows = (f"{name} {i // 1000 % 1000}\n" for i, name in enumerate(names_of(count)))
    (root / "list.txt").write_text("".join(rows))
    return {"format": "image_list", "images": "images", "list": "list.txt"}


def _class_folders(root: Path, count: int) -> dict[str, Any]:
    write_files(root / "images", count)
    return {"format": "class_folders", "images": "images"}


def _image_table(root: Path, count: int) -> dict[str, Any]:
    write_files(root / "images", count)
    rows = (f"{name},{i},{os.path.dirname(name)}\n" for i, name in enumerate(names_of(count)))
    (root / "table.csv").write_text("".join(["image,number,label\n", *rows]))
    return {"format": "image_table", "images": "images", "table": "table.csv"}


def _coco(root: Path, count: int) -> dict[str, Any]:
    write_files(root / "images", count)
    images = [{"id": i, "file_name": n, "height": SIDE, "width": SIDE} for i, n in enumerate(names_of(count))]
    boxes = [
        {"id": i, "image_id": i // 2, "category_id": 1 + i % 80, "bbox": [i % 7, 2.5, 9 + i % 11, 12.25], "iscrowd": 0}
        for i in range(2 * count)
    ]
    categories = [{"id": 1 + k, "name": f"class_{k}"} for k in range(80)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
    return {"format": "coco", "images": "images", "annotations": "boxes.json"}


def _label_maps(root: Path, count: int) -> dict[str, Any]:
    write_files(root / "images", count)
    write_files(root / "maps", count, "PNG")
    return {"format": "label_maps", "images": "images", "label_maps": "maps", "classes": ["ground", "sky"]}


def _webdataset(root: Path, count: int) -> dict[str, Any]:
    (root / "shards").mkdir()
    pictures = [encoded(k, "JPEG") for k in range(16)]
    for first in range(0, count, _SHARD):
        with tarfile.open(root / "shards" / f"{first // _SHARD:05}.tar", "w") as archive:
            for i in range(first, min(first + _SHARD, count)):
                for ending, content in (("jpg", pictures[i % 16]), ("cls", str(i // 1000 % 1000).encode())):
                    member = tarfile.TarInfo(f"image_{i:08}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return {"format": "webdataset", "shards": "shards/*.tar", "kind": "classification", "classes": CLASSES}


def _datasets(root: Path, count: int) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    pictures = [encoded(k, "JPEG") for k in range(16)]

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"image": {"bytes": pictures[i % 16], "path": None}, "label": i // 1000 % 1000}

    label = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    made: Any = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(root / "cache"))
    made.save_to_disk(str(root / "saved"))
    return {"format": "datasets", "path": "saved", "kind": "classification"}


def _many_tasks(root: Path, count: int) -> dict[str, Any]:
    """Return 40 lists of a fortieth of the files each."""
    write_files(root / "images", count)
    names = list(names_of(count))
    part = count // _TASKS
    sources = {}
    for t in range(_TASKS):
        rows = (f"{name} {i % 10}\n" for i, name in enumerate(names[t * part : (t + 1) * part]))
        (root / f"task_{t}.txt").write_text("".join(rows))
        sources[f"task_{t}"] = {"format": "image_list", "images": "images", "list": f"task_{t}.txt"}
    return sources


def _many_large_tasks(root: Path, count: int) -> dict[str, Any]:
    """Return 40 tasks that all read the same list."""
    source = _image_list(root, count)
    return {f"task_{t}": source for t in range(_TASKS)}


SETS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "image_list": _image_list,
    "class_folders": _class_folders,
    "image_table": _image_table,
    "coco": _coco,
    "label_maps": _label_maps,
    "webdataset": _webdataset,
    "datasets": _datasets,
    "40 tasks": _many_tasks,
    "40 tasks, each of all files": _many_large_tasks,
}
"""What is measured -> function that writes the set below a folder and returns its source, or {task: source}."""
