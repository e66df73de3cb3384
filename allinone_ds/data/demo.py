"""Demo data: composed scenes from real photos, written to disk in the three formats that the readers read.

Real product photos (Fashion-MNIST, 10 classes) are cut out and pasted on crops of real photos. Train and test
use different product photos (the official split) and different background photos. Every scene is a pure
function of (seed, task, split, index).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
FOREGROUND = 12  # grey levels; above this a tile's pixel belongs to the product
MARKER = "demo.json"

Bytes = NDArray[np.uint8]


class SceneLook(Strict):
    """How the scenes of one task look."""

    size: int = Field(default=48, ge=16)
    """Side of the square picture, pixels."""
    objects: tuple[int, int] = (1, 2)
    """Least and most products tried in a picture."""
    scale: tuple[float, float] = (0.45, 0.75)
    """Least and greatest side of a product's tile, as a part of the picture's side."""
    overlap: float = Field(default=0.1, ge=0, le=1)
    """A product is placed only where its tile's box shares at most this part of any earlier one's."""


class DemoSizes(Strict):
    """Number of pictures a task and split, and how they look."""

    detection: tuple[int, int] = (2400, 300)
    segmentation: tuple[int, int] = (2400, 300)
    classification: tuple[int, int] = (4800, 600)
    detection_look: SceneLook = SceneLook()
    segmentation_look: SceneLook = SceneLook(scale=(0.55, 0.9), overlap=0.15)
    classification_look: SceneLook = SceneLook(size=40, objects=(1, 1), scale=(0.65, 0.95))


DEMO_SIZES = DemoSizes()
"""What the five-minute demo trains on."""
FULL_SIZES = DemoSizes(detection=(6000, 400), segmentation=(6000, 400), classification=(12000, 1000))
"""What the full demo trains on: the same scenes, more of them."""


@dataclass(frozen=True)
class Scene:
    """One composed picture with its truth; products whose visible part is empty are left out."""

    image: Bytes  # (H, W, 3)
    label_map: Bytes  # (H, W): 0 background, class + 1 inside products, 255 where product and background mix
    instances: Bytes  # (H, W): 0 background, i + 1 where product i is seen
    boxes: NDArray[np.float32]  # (n, 4) XYXY pixels, tight around what is seen
    labels: NDArray[np.int64]  # (n,) in 0..9


@dataclass(frozen=True)
class DemoData:
    """Where the demo data lies."""

    root: Path
    classes: tuple[str, ...] = CLASSES

    def sources(self, task: str, split: str) -> dict[str, Any]:
        """The source description of one task and split, paths relative to `root`."""
        if task == "detection":
            return {"format": "coco", "images": f"{task}/{split}", "annotations": f"{task}/{split}.json"}
        if task == "segmentation":
            where = {"images": f"{task}/{split}/images", "label_maps": f"{task}/{split}/label_maps"}
            return {"format": "label_maps", **where, "classes": f"{task}/classes.txt", "ignore_index": IGNORE}
        where = {"images": f"{task}/{split}", "list": f"{task}/{split}.txt"}
        return {"format": "image_list", **where, "classes": f"{task}/classes.txt"}


@dataclass(frozen=True)
class Pool:
    """What the scenes of one split are made of."""

    tiles: Bytes  # (n, 28, 28)
    alphas: Bytes  # (n, 28, 28): 255 where the product is, holes filled
    labels: NDArray[np.int64]  # (n,)
    photos: tuple[Image.Image, ...]
    photo_names: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES


@lru_cache(maxsize=2)
def load_pool(split: str) -> Pool:
    """Read the vendored tiles and photos of one split."""
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
    tiles: Bytes,
    photos: Sequence[Image.Image],
    photo_names: Sequence[str],
    classes: Sequence[str] = CLASSES,
) -> Pool:
    """A pool of one's own: cuts the products out of their tiles.

    Args:
        tiles: (n, 28, 28) grey pictures on black, sorted by class, equally many of every class.
        photos: what scenes have behind their products, RGB.
        photo_names: of the photos.
        classes: names of the classes.
    """
    # One labelling for all tiles: a frame of background joins every outside; what is not joined is a hole.
    framed = np.pad(tiles > FOREGROUND, ((0, 0), (1, 1), (1, 1)))
    side = TILE + 2
    outside, _ = ndimage.label(~framed.reshape(-1, side))
    alphas = (outside != outside[0, 0]).reshape(-1, side, side)[:, 1:-1, 1:-1].astype(np.uint8) * 255
    labels = np.arange(len(tiles)) // (len(tiles) // len(classes))
    return Pool(np.ascontiguousarray(tiles), alphas, labels, tuple(photos), tuple(photo_names), tuple(classes))


def compose_scene(rng: np.random.Generator, pool: Pool, look: SceneLook, first_label: int | None = None) -> Scene:
    """Paste cut-out product photos on a crop of a photo.

    Args:
        rng: the only source of chance.
        pool: tiles and photos of the split.
        look: size of the picture, number and size of the products.
        first_label: class of the first product; drawn when None.
    """
    size = look.size
    canvas = _background(rng, pool, size)  # (H, W, 3) float32
    label_map = np.zeros((size, size), np.uint8)
    instances = np.zeros((size, size), np.uint8)
    labels: list[int] = []
    placed: list[tuple[int, int, int]] = []  # left, top, side of each pasted tile
    for number in range(int(rng.integers(look.objects[0], look.objects[1] + 1))):
        side = min(size, max(8, round(rng.uniform(*look.scale) * size)))
        spot = _free_spot(rng, placed, side, size, look.overlap)
        if spot is None:
            continue
        index = _draw_tile(rng, pool, first_label if number == 0 else None)
        left, top = spot
        tile, alpha = _stretched(rng, pool, index, side)  # (s, s) each, in 0..1
        window = np.s_[top : top + side, left : left + side]
        tint = rng.uniform(0.55, 1.0, 3).astype(np.float32)
        canvas[window] += alpha[..., None] * (tile[..., None] * tint - canvas[window])
        label = int(pool.labels[index])
        labels.append(label)
        inside, mixed = alpha >= 0.5, (alpha > 0) & (alpha < 0.9)
        instances[window][inside] = len(labels)
        label_map[window][inside] = label + 1
        label_map[window][mixed] = IGNORE
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
    """A square crop of a photo, mirrored, turned and tinted by chance, as (H, W, 3) in 0..1."""
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


def _stretched(
    rng: np.random.Generator, pool: Pool, index: int, side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A tile and its alpha at `side` x `side` pixels in 0..1, mirrored by chance."""
    both = np.empty((2, side, side), np.float32)
    for filled, plane in zip(both, (pool.tiles, pool.alphas), strict=True):
        filled[:] = np.asarray(Image.fromarray(plane[index]).resize((side, side), Image.Resampling.BILINEAR))
    both /= np.float32(255)
    if rng.random() < 0.5:
        both = both[:, :, ::-1]
    return both[0], both[1]


def _free_spot(
    rng: np.random.Generator, placed: list[tuple[int, int, int]], side: int, size: int, overlap: float
) -> tuple[int, int] | None:
    """A top-left corner where the tile hides little of the earlier ones, or None after ten draws."""
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
    """Write the demo data of the three tasks; does nothing when `root` already holds the same.

    Args:
        root: folder to fill; made when missing. Folders in it that another program wrote are not touched.
        seed: two seeds give different scenes; one seed always gives the same files.
        sizes: number of pictures and their look.
        progress: show a progress bar.
        pools: what the scenes of "train" and "test" are made of; None is what comes with the package.

    Raises:
        FileExistsError: a folder to be written exists, and no marker says that it is demo data.
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
                    f"{root / task} exists and {marker} does not, so it is not demo data; give another folder"
                )
            shutil.rmtree(root / task)
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**wanted, "complete": False}))
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        for task_number, task in enumerate(TASKS):
            for split_number, split in enumerate(SPLITS):
                count = getattr(sizes, task)[split_number]
                job = bar.add_task(f"composing {task} {split}", total=count)
                rngs = (np.random.default_rng([seed, task_number, split_number, i]) for i in range(count))
                look = getattr(sizes, f"{task}_look")
                tick = _Tick(bar, job)
                pool = load_pool(split) if pools is None else pools[split]
                _WRITERS[task](root / task, split, pool, look, rngs, tick)
    marker.write_text(json.dumps({**wanted, "complete": True}))
    return data


class _Tick:
    """Moves a progress bar by one at each call."""

    def __init__(self, bar: Any, job: Any) -> None:
        self.bar, self.job = bar, job

    def __call__(self) -> None:
        self.bar.advance(self.job)


def _save(image: Bytes, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _write_detection(where: Path, split: str, pool: Pool, look: SceneLook, rngs: Any, tick: _Tick) -> None:
    (where / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, rng in enumerate(rngs):
        scene = compose_scene(rng, pool, look)
        name = f"{i:06d}.jpg"
        _save(scene.image, where / split / name)
        images.append({"id": i, "file_name": name, "width": look.size, "height": look.size})
        for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0}
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        tick()
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(pool.classes)]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (where / f"{split}.json").write_text(json.dumps(table))


def _write_segmentation(where: Path, split: str, pool: Pool, look: SceneLook, rngs: Any, tick: _Tick) -> None:
    for kind in ("images", "label_maps"):
        (where / split / kind).mkdir(parents=True)
    (where / "classes.txt").write_text("\n".join(["background", *pool.classes]) + "\n")
    for i, rng in enumerate(rngs):
        scene = compose_scene(rng, pool, look)
        _save(scene.image, where / split / "images" / f"{i:06d}.jpg")
        Image.fromarray(scene.label_map).save(where / split / "label_maps" / f"{i:06d}.png", compress_level=1)
        tick()


def _write_classification(where: Path, split: str, pool: Pool, look: SceneLook, rngs: Any, tick: _Tick) -> None:
    (where / split).mkdir(parents=True)
    (where / "classes.txt").write_text("\n".join(pool.classes) + "\n")
    lines = []
    for i, rng in enumerate(rngs):
        label = i % len(pool.classes)
        scene = compose_scene(rng, pool, look, first_label=label)
        name = f"{i:06d}.jpg"
        _save(scene.image, where / split / name)
        lines.append(f"{name} {label}\n")
        tick()
    (where / f"{split}.txt").write_text("".join(lines))


_WRITERS = {
    "detection": _write_detection,
    "segmentation": _write_segmentation,
    "classification": _write_classification,
}
