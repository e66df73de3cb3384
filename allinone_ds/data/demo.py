"""Demo data: scenes composed of real photos, written to disk in three of the data formats.

Product photos (Fashion-MNIST, 10 classes) are cut out and pasted on crops of background photos. Train and test use
different product photos (the official split) and different background photos. Every scene is a pure function of
(seed, task, split, index).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy import ndimage

from allinone_ds.strict import Strict

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SPLITS = ("train", "test")
TASKS = ("detection", "segmentation", "classification")
IGNORE = 255
TILE = 28
FOREGROUND = 12  # grey level above which a pixel of a tile belongs to the product
MARKER = "demo.json"

Pixels = NDArray[np.uint8]
Rngs = Iterable[np.random.Generator]
Advance = Callable[[], None]
"""Advances a progress bar by one image."""


class SceneLook(Strict):
    """Size and content of the scenes of one task."""

    size: int = Field(default=48, ge=16)
    """Side of the square image in pixels."""
    objects: tuple[int, int] = (1, 2)
    """(least, largest) number of products that are placed in an image, where there is space."""
    scale: tuple[float, float] = (0.45, 0.75)
    """(least, largest) side of a product's tile, as a fraction of the side of the image."""
    overlap: float = Field(default=0.1, ge=0, le=1)
    """Largest overlap with the tile of an earlier product, as a fraction of the smaller tile's area."""


class DemoSizes(Strict):
    """Number of images (train, test) per task, and the look of its scenes."""

    detection: tuple[int, int] = (2400, 300)
    segmentation: tuple[int, int] = (2400, 300)
    classification: tuple[int, int] = (4800, 600)
    detection_look: SceneLook = SceneLook()
    segmentation_look: SceneLook = SceneLook(scale=(0.55, 0.9), overlap=0.15)
    classification_look: SceneLook = SceneLook(size=40, objects=(1, 1), scale=(0.65, 0.95))


DEMO_SIZES = DemoSizes()
"""Sizes of the five-minute demo."""
FULL_SIZES = DemoSizes(detection=(6000, 400), segmentation=(6000, 400), classification=(12000, 1000))
"""Sizes of the full demo: more scenes of the same look."""


@dataclass(frozen=True)
class Scene:
    """A composed image with its labels; products that are completely hidden are left out."""

    image: Pixels  # (H, W, 3)
    label_map: Pixels  # (H, W): 0 background, class + 1 inside products, 255 where product and background are blended
    instances: Pixels  # (H, W): 0 background, i + 1 where product i is visible
    boxes: NDArray[np.float32]  # (n, 4) XYXY in pixels, tight around the visible part
    labels: NDArray[np.int64]  # (n,) in 0..9


@dataclass(frozen=True)
class DemoData:
    """The folder of the demo data, and its sources."""

    root: Path
    classes: tuple[str, ...] = CLASSES

    def sources(self, task: str, split: str) -> dict[str, Any]:
        """Return the source of a task and split as a config gives it, with paths relative to `root`."""
        if task == "detection":
            return {"format": "coco", "images": f"{task}/{split}", "annotations": f"{task}/{split}.json"}
        if task == "segmentation":
            where = {"images": f"{task}/{split}/images", "label_maps": f"{task}/{split}/label_maps"}
            return {"format": "label_maps", **where, "classes": f"{task}/classes.txt", "ignore_index": IGNORE}
        where = {"images": f"{task}/{split}", "list": f"{task}/{split}.txt"}
        return {"format": "image_list", **where, "classes": f"{task}/classes.txt"}


@dataclass(frozen=True)
class Pool:
    """The product tiles and background photos of one split."""

    tiles: Pixels  # (n, 28, 28)
    alphas: Pixels  # (n, 28, 28): 255 inside the product, holes filled
    labels: NDArray[np.int64]  # (n,)
    photos: tuple[Image.Image, ...]
    photo_names: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES


@lru_cache(maxsize=2)
def load_pool(split: str) -> Pool:
    """Return the tiles and photos of one split that are part of the package."""
    assets = files("allinone_ds.data") / "assets"
    with (assets / f"tiles-{split}.png").open("rb") as file:
        sheet = np.asarray(Image.open(file))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE).transpose(0, 2, 1, 3).reshape(-1, TILE, TILE)
    photos, names = [], []
    for item in sorted(assets.iterdir(), key=lambda entry: entry.name):
        if item.name.startswith(f"photo-{split}-"):
            with item.open("rb") as file:
                photos.append(Image.open(file).convert("RGB"))
            names.append(item.name)
    return make_pool(tiles, photos, names)


def make_pool(
    tiles: Pixels,
    photos: Sequence[Image.Image],
    photo_names: Sequence[str],
    classes: Sequence[str] = CLASSES,
) -> Pool:
    """Return a pool of the given tiles and photos, with the products cut out of their tiles.

    Args:
        tiles: grey images on black (n, 28, 28), sorted by class, equally many per class.
        photos: background photos, RGB.
        photo_names: names of the photos.
        classes: names of the classes.
    """
    # One connected-component labelling serves all tiles: a frame connects the outside of all; the rest are holes.
    framed = np.pad(tiles > FOREGROUND, ((0, 0), (1, 1), (1, 1)))
    side = TILE + 2
    outside, _ = ndimage.label(~framed.reshape(-1, side))
    alphas = (outside != outside[0, 0]).reshape(-1, side, side)[:, 1:-1, 1:-1].astype(np.uint8) * 255
    labels = np.arange(len(tiles)) // (len(tiles) // len(classes))
    return Pool(np.ascontiguousarray(tiles), alphas, labels, tuple(photos), tuple(photo_names), tuple(classes))


def compose_scene(rng: np.random.Generator, pool: Pool, look: SceneLook, first_label: int | None = None) -> Scene:
    """Return a scene: product tiles pasted on a crop of a background photo.

    Args:
        rng: the generator of all random numbers.
        pool: tiles and photos of the split.
        look: size of the image, number and size of the products.
        first_label: class of the first product; None draws it.
    """
    size = look.size
    canvas = _background(rng, pool, size)  # (H, W, 3) float32
    label_map = np.zeros((size, size), np.uint8)
    instances = np.zeros((size, size), np.uint8)
    labels: list[int] = []
    placed: list[tuple[int, int, int]] = []  # left, top, side of each pasted tile
    for number in range(int(rng.integers(look.objects[0], look.objects[1] + 1))):
        side = min(size, max(8, round(rng.uniform(*look.scale) * size)))
        corner = _free_corner(rng, placed, side, size, look.overlap)
        if corner is None:
            continue
        index = _draw_tile(rng, pool, first_label if number == 0 else None)
        left, top = corner
        tile, alpha = _resize_tile(rng, pool, index, side)  # (s, s) each, in 0..1
        window = np.s_[top : top + side, left : left + side]
        tint = rng.uniform(0.55, 1.0, 3).astype(np.float32)
        canvas[window] += alpha[..., None] * (tile[..., None] * tint - canvas[window])
        label = int(pool.labels[index])
        labels.append(label)
        inside, blended = alpha >= 0.5, (alpha > 0) & (alpha < 0.9)
        instances[window][inside] = len(labels)
        label_map[window][inside] = label + 1
        label_map[window][blended] = IGNORE
        placed.append((left, top, side))
    boxes, kept = [], []
    for number, found in enumerate(ndimage.find_objects(instances, max_label=len(labels))):
        if found is not None:
            rows, columns = found
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
            kept.append(labels[number])
    return Scene(
        image=(canvas * 255).round().clip(0, 255).astype(np.uint8),
        label_map=label_map,
        instances=instances,
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=np.asarray(kept, np.int64),
    )


def _background(rng: np.random.Generator, pool: Pool, size: int) -> NDArray[np.float32]:
    """Return a square crop of a photo, randomly mirrored, rotated and tinted, (H, W, 3) in 0..1."""
    photo = pool.photos[int(rng.integers(len(pool.photos)))]
    side = rng.uniform(0.3, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    box = (left, top, left + side, top + side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=1.0)
    pixels = np.asarray(crop, np.float32) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = np.rot90(pixels, int(rng.integers(4)))
    gain = rng.uniform(0.6, 1.1) * rng.uniform(0.8, 1.2, 3)
    return np.ascontiguousarray(np.clip(pixels * gain.astype(np.float32), 0, 1), dtype=np.float32)


def _draw_tile(rng: np.random.Generator, pool: Pool, label: int | None) -> int:
    per_class = len(pool.tiles) // len(pool.classes)
    label = int(rng.integers(len(pool.classes))) if label is None else label
    return label * per_class + int(rng.integers(per_class))


def _resize_tile(
    rng: np.random.Generator, pool: Pool, index: int, side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a tile and its alpha, randomly mirrored, both (side, side) in 0..1."""
    both = np.empty((2, side, side), np.float32)
    for filled, plane in zip(both, (pool.tiles, pool.alphas), strict=True):
        filled[:] = np.asarray(Image.fromarray(plane[index]).resize((side, side), Image.Resampling.BILINEAR))
    both /= np.float32(255)
    if rng.random() < 0.5:
        both = both[:, :, ::-1]
    return both[0], both[1]


def _free_corner(
    rng: np.random.Generator, placed: list[tuple[int, int, int]], side: int, size: int, overlap: float
) -> tuple[int, int] | None:
    """Return a (left, top) corner with little overlap with the earlier tiles, or None after ten draws."""
    for left, top in rng.integers(0, size - side + 1, (10, 2)).tolist():
        for other_left, other_top, other_side in placed:
            width = min(left + side, other_left + other_side) - max(left, other_left)
            height = min(top + side, other_top + other_side) - max(top, other_top)
            if width > 0 and height > 0 and width * height > overlap * min(side, other_side) ** 2:
                break
        else:
            return left, top
    return None


def make_demo_data(
    root: Path,
    seed: int = 0,
    sizes: DemoSizes | None = None,
    progress: bool = True,
    pools: Mapping[str, Pool] | None = None,
) -> DemoData:
    """Write the demo data of the three tasks, unless `root` already contains it.

    Args:
        root: folder to write to; it is created if necessary. Folders of other programs in it are not modified.
        seed: seed of the scenes; equal seeds give equal files.
        sizes: number of images and the look of the scenes; None is that of the five-minute demo.
        progress: show a progress bar.
        pools: tiles and photos of "train" and "test"; None uses those of the package.

    Returns:
        The folder, with a method that gives the source of each task and split.

    Raises:
        FileExistsError: a folder to be written exists, and `demo.json` does not mark it as demo data.

    Example:
        >>> import tempfile
        >>> sizes = DemoSizes(detection=(2, 1), segmentation=(2, 1), classification=(2, 1))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     data = make_demo_data(Path(root), sizes=sizes, progress=False)
        >>> data.sources("classification", "train")["list"]
        'classification/train.txt'
    """
    root, sizes = Path(root), sizes or DemoSizes()
    data = DemoData(root, CLASSES if pools is None else pools["train"].classes)
    wanted = {"version": 1, "seed": seed, "sizes": sizes.model_dump(mode="json")}
    if pools is not None:
        wanted["pools"] = {split: [len(pool.tiles), *pool.classes, *pool.photo_names] for split, pool in pools.items()}
    marker = root / MARKER
    if marker.exists() and json.loads(marker.read_text()) == {**wanted, "complete": True}:
        return data
    for task in TASKS:
        if (root / task).exists():
            if not marker.exists():
                raise FileExistsError(
                    f"{root / task} exists and {marker} does not, so it is not demo data; give a different folder"
                )
            shutil.rmtree(root / task)
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**wanted, "complete": False}))
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        for task_number, task in enumerate(TASKS):
            for split_number, split in enumerate(SPLITS):
                count = getattr(sizes, task)[split_number]
                row = bar.add_task(f"composing {task} {split}", total=count)
                rngs = (np.random.default_rng([seed, task_number, split_number, i]) for i in range(count))
                look = getattr(sizes, f"{task}_look")
                pool = load_pool(split) if pools is None else pools[split]
                _WRITERS[task](root / task, split, pool, look, rngs, partial(bar.advance, row))
    marker.write_text(json.dumps({**wanted, "complete": True}))
    return data


def _save(image: Pixels, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _write_detection(folder: Path, split: str, pool: Pool, look: SceneLook, rngs: Rngs, advance: Advance) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, rng in enumerate(rngs):
        scene = compose_scene(rng, pool, look)
        name = f"{i:06d}.jpg"
        _save(scene.image, folder / split / name)
        images.append({"id": i, "file_name": name, "width": look.size, "height": look.size})
        for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0}
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        advance()
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(pool.classes)]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(table))


def _write_segmentation(folder: Path, split: str, pool: Pool, look: SceneLook, rngs: Rngs, advance: Advance) -> None:
    for kind in ("images", "label_maps"):
        (folder / split / kind).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(["background", *pool.classes]) + "\n")
    for i, rng in enumerate(rngs):
        scene = compose_scene(rng, pool, look)
        _save(scene.image, folder / split / "images" / f"{i:06d}.jpg")
        Image.fromarray(scene.label_map).save(folder / split / "label_maps" / f"{i:06d}.png", compress_level=1)
        advance()


def _write_classification(folder: Path, split: str, pool: Pool, look: SceneLook, rngs: Rngs, advance: Advance) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(pool.classes) + "\n")
    lines = []
    for i, rng in enumerate(rngs):
        label = i % len(pool.classes)
        scene = compose_scene(rng, pool, look, first_label=label)
        name = f"{i:06d}.jpg"
        _save(scene.image, folder / split / name)
        lines.append(f"{name} {label}\n")
        advance()
    (folder / f"{split}.txt").write_text("".join(lines))


_WRITERS = {
    "detection": _write_detection,
    "segmentation": _write_segmentation,
    "classification": _write_classification,
}
