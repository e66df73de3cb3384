"""Data of the ladder: composed scenes from all of Fashion-MNIST, with the labels of one task or of eight, and crops of
aerial photos with their own boxes.

Products come from Debian's package dataset-fashion-mnist: of each class in its training split the first 5,500 photos
are for training and the last 500 for validation; its test split is for testing. Backgrounds are the photos of
scikit-image in this package: five for training, two for validation, four for testing. No product and no photo is in two
of the three splits.
"""

from __future__ import annotations

import gzip
import json
import shutil
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allinone_ds.data.demo import (
    CLASSES,
    DemoSizes,
    JointSizes,
    Pool,
    SceneLook,
    load_pool,
    make_demo_data,
    make_joint_demo_data,
    make_pool,
)

FASHION = Path("/usr/share/datasets/fashion-mnist")
PER_CLASS = 6000  # photos per class in Fashion-MNIST's training split
HELD_OUT = 500  # of these for validation
VALIDATION_PHOTOS = ("chelsea", "brick")
KEPT = {
    "cpu": ("t-shirt", "trouser", "dress", "sandal", "bag", "ankle boot"),  # shirts and sneakers take longer to learn
    "gpu": CLASSES,
}
"""Size -> classes."""
SEED = 0  # of the scenes; the seeds of runs decide weights, order and augmentation
SPLITS = ("validation", "test")

SIZES = {
    "cpu": {
        "train": (3000, 3000, 6000), "validation": (600, 600, 1000), "test": (1000, 1000, 2000),
        "looks": {
            "detection_look": SceneLook(size=32, scale=(0.5, 0.8)),
            "segmentation_look": SceneLook(size=32, scale=(0.55, 0.9), overlap=0.15),
            "classification_look": SceneLook(size=32, objects=(1, 1), scale=(0.65, 0.95)),
        },
    },
    "gpu": {
        "train": (20000, 20000, 40000), "validation": (1000, 1000, 2000), "test": (2000, 2000, 5000),
        "looks": {
            "detection_look": SceneLook(size=128, objects=(2, 5), scale=(0.2, 0.45)),
            "segmentation_look": SceneLook(size=128, objects=(2, 4), scale=(0.3, 0.6), overlap=0.15),
            "classification_look": SceneLook(size=96, objects=(1, 1), scale=(0.5, 0.95)),
        },
    },
}  # fmt: skip
"""Number of images for (detection, segmentation, classification) by split, and looks that differ from the demo's."""

JOINT = {
    "cpu": JointSizes(train=6000, test=1000, look=SceneLook(size=32, scale=(0.4, 0.8), overlap=0.3, nearest_last=True)),
}
"""Size -> the scenes that have all labels; validation has 600."""
JOINT_VALIDATION = 600

TREES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", (0, 0, 2299, 1850)),
    "validation": ("2019_YELL_2_528000_4978000_image_crop2", (0, 1850, 2299, 2472)),
    "test": ("2019_YELL_2_541000_4977000_image_crop", (0, 0, 1249, 1035)),
}
"""Split -> photo and region (left, top, right, bottom) in pixels, of DeepForest's two large photos with boxes."""
CROP = {"cpu": 96, "gpu": 256}  # pixels; a tree is about 40 wide


def read_idx(path: Path) -> np.ndarray:
    """Return the content of a gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(np.frombuffer(raw, ">i4", dims, offset=4))


def _tiles(stem: str, first: int, last: int, classes: tuple[str, ...]) -> np.ndarray:
    """Return photos `first` to `last` of each class, sorted by class, (n, 28, 28)."""
    files = [FASHION / f"{stem}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    if not all(file.is_file() for file in files):
        raise SystemExit(f"{FASHION} has no Fashion-MNIST; install it with: apt-get install dataset-fashion-mnist")
    images, labels = map(read_idx, files)
    return np.concatenate([images[labels == k][first:last] for k in map(CLASSES.index, classes)])


def pools(classes: tuple[str, ...]) -> dict[str, Pool]:
    """Return the products and backgrounds of "train", "validation" and "test"."""
    shipped = load_pool("train")
    photos = list(zip(shipped.photos, shipped.photo_names, strict=True))
    held = [any(name in file for name in VALIDATION_PHOTOS) for _, file in photos]
    kept = {
        split: [photo for photo, is_held in zip(photos, held, strict=True) if is_held == (split == "validation")]
        for split in ("train", "validation")
    }
    kept["test"] = list(zip(load_pool("test").photos, load_pool("test").photo_names, strict=True))
    tiles = {
        "train": _tiles("train", 0, PER_CLASS - HELD_OUT, classes),
        "validation": _tiles("train", PER_CLASS - HELD_OUT, PER_CLASS, classes),
        "test": _tiles("t10k", 0, 1000, classes),
    }
    return {split: make_pool(tiles[split], *zip(*kept[split], strict=True), classes) for split in tiles}


def composed(size: str, split: str) -> DemoSizes:
    """Return number and look of the images for training and of one of `SPLITS`."""
    given: dict[str, Any] = SIZES[size]
    counts = zip(("detection", "segmentation", "classification"), given["train"], given[split], strict=True)
    return DemoSizes(**{task: (train, held) for task, train, held in counts}, **given["looks"])


def describe(data: str, size: str) -> dict[str, Any]:
    """Return everything that decides which images a run reads, as JSON values."""
    facts: dict[str, Any] = {split: composed(size, split).model_dump(mode="json") for split in SPLITS}
    for look in (part for split in SPLITS for part in facts[split].values() if isinstance(part, dict)):
        if not look["nearest_last"]:  # the scenes are those of records from before there was this option
            del look["nearest_last"]
    facts |= {"seed": SEED, "held_out": HELD_OUT, "photos": VALIDATION_PHOTOS, "classes": KEPT[size]}
    if data == "joint":
        return {**facts, "scenes": JOINT[size].model_dump(mode="json"), "validation": JOINT_VALIDATION}
    return facts if data == "composed" else {**facts, "trees": TREES, "crop": CROP[size]}


def make_data(root: Path, data: str, size: str, wheel: Path | None = None) -> None:
    """Write ROOT/validation and ROOT/test, unless they exist with the same content.

    Both hold the same images for training; their "test" folders hold the images on which the split is scored.

    Args:
        root: a folder that holds nothing else; its content is replaced.
        data: "composed"; "native": detection on DeepForest's photos, the other two tasks as in "composed"; or "joint":
            scenes that have the labels of eight tasks.
        size: of `SIZES`.
        wheel: of DeepForest, for "native".
    """
    marker, wanted = root / "ladder.json", json.dumps(describe(data, size))
    if marker.is_file() and marker.read_text() == wanted:
        return
    if root.exists():
        shutil.rmtree(root)
    made = pools(KEPT[size])
    for split in SPLITS:
        parts = {"train": made["train"], "test": made[split]}
        if data == "joint":
            sizes = JOINT[size].model_copy(update={"test": JOINT_VALIDATION} if split == "validation" else {})
            make_joint_demo_data(root / split, SEED, sizes, progress=False, pools=parts)
            continue
        make_demo_data(root / split, SEED, composed(size, split), progress=False, pools=parts)
    if data == "native":
        assert wheel is not None
        _replace_detection(root, CROP[size], wheel)
    marker.write_text(wanted)


# ---- the native check ----


def _trees(archive: zipfile.ZipFile, photo: str) -> tuple[Image.Image, np.ndarray]:
    """Return one of DeepForest's photos and its boxes, (n, 4) XYXY in pixels."""
    with archive.open(f"deepforest/data/{photo}.png") as file:
        image = Image.open(file).convert("RGB")
    root = ElementTree.fromstring(archive.read(f"deepforest/data/{photo}.xml"))
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[float(box.findtext(c, "")) for c in corners] for box in root.iter("bndbox")]
    return image, np.asarray(boxes, np.float32)


def crops(
    boxes: np.ndarray, region: tuple[int, int, int, int], side: int, stride: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield square windows of a region that contain a tree.

    Args:
        boxes: (n, 4) XYXY of the photo, pixels.
        region: (left, top, right, bottom) that contains all windows.
        side: of the windows, pixels.
        stride: between windows, pixels.

    Yields:
        left, top, and the boxes (m, 4) clipped to the window, in its pixels, of the trees at least half inside it.
    """
    left, top, right, bottom = region
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for y in range(top, bottom - side + 1, stride):
        for x in range(left, right - side + 1, stride):
            inside = np.clip(boxes - np.float32([x, y, x, y]), 0, side)
            seen = (inside[:, 2:] - inside[:, :2]).prod(1)
            kept = inside[seen >= 0.5 * areas]
            if len(kept):
                yield x, y, kept


def _replace_detection(root: Path, side: int, wheel: Path) -> None:
    """Replace the composed scenes of detection by crops of DeepForest's photos, `side` pixels wide."""
    with zipfile.ZipFile(wheel) as archive:
        photos = {photo: _trees(archive, photo) for photo, _ in TREES.values()}
    for split in SPLITS:
        where = root / split / "detection"
        shutil.rmtree(where)
        for name, source, stride in (("train", "train", side // 2), ("test", split, side)):
            (where / name).mkdir(parents=True)
            photo, region = TREES[source]
            image, boxes = photos[photo]
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for i, (x, y, seen) in enumerate(crops(boxes, region, side, stride)):
                image.crop((x, y, x + side, y + side)).save(where / name / f"{i:06d}.png")
                images.append({"id": i, "file_name": f"{i:06d}.png", "width": side, "height": side})
                for x1, y1, x2, y2 in seen.tolist():
                    box = [x1, y1, x2 - x1, y2 - y1]
                    annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                                        "bbox": box, "area": box[2] * box[3]})  # fmt: skip
            table = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
            (where / f"{name}.json").write_text(json.dumps(table))
