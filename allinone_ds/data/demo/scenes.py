"""Scenes composed of real photos.

Product photos (Fashion-MNIST, 10 classes) are cut out and pasted on crops of background photos. Train and test use
different product photos (the official split) and different background photos. Every scene is a pure function of
(seed, task, split, index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

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
IGNORE = 255
TILE = 28
FOREGROUND = 12  # grey level above which a pixel of a tile belongs to the product

Pixels = NDArray[np.uint8]
Rngs = Iterable[np.random.Generator]
Advance = Callable[[], None]
"""Advances a progress bar by one image."""


class SceneLook(Strict):
    """Size and content of the scenes of one task.

    Example:
        >>> SceneLook(objects=(1, 1)).size
        48
    """

    size: int = Field(default=48, ge=16)
    """Side of the square image in pixels."""
    objects: tuple[int, int] = (1, 2)
    """(least, largest) number of products that are placed in an image, where there is space."""
    scale: tuple[float, float] = (0.45, 0.75)
    """(least, largest) side of a product's tile, as a fraction of the side of the image."""
    overlap: float = Field(default=0.1, ge=0, le=1)
    """Largest overlap with the tile of an earlier product, as a fraction of the smaller tile's area."""
    nearest_last: bool = False
    """Paste products by size, so that a larger one, which is nearer, hides a smaller one and never the reverse."""


@dataclass(frozen=True)
class Scene:
    """A composed image with its labels; products that are completely hidden are left out.

    Example:
        >>> scene = compose_scene(np.random.default_rng(0), load_pool("train"), SceneLook(objects=(1, 1)))
        >>> scene.image.shape, len(scene.boxes), int(scene.instances.max())
        ((48, 48, 3), 1, 1)
    """

    image: Pixels  # (H, W, 3)
    label_map: Pixels  # (H, W): 0 background, class + 1 inside products, 255 where product and background are blended
    instances: Pixels  # (H, W): 0 background, i + 1 where product i is visible
    boxes: NDArray[np.float32]  # (n, 4) XYXY in pixels, tight around the visible part
    labels: NDArray[np.int64]  # (n,) in 0..9
    sides: NDArray[np.float32]  # (n,) side of each product's tile, as a fraction of the side of the image
    tints: NDArray[np.float32]  # (n, 3) factor of each colour channel, in 0.55..1


@dataclass(frozen=True)
class Pool:
    """The product tiles and background photos of one split.

    Example:
        >>> load_pool("test").tiles.shape[1:]
        (28, 28)
    """

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
    tints: list[NDArray[np.float32]] = []
    count = int(rng.integers(look.objects[0], look.objects[1] + 1))
    ordered = sorted(_draw_side(rng, look) for _ in range(count)) if look.nearest_last else None
    for number in range(count):
        side = _draw_side(rng, look) if ordered is None else ordered[number]
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
        tints.append(tint)
    boxes, kept = [], []
    for number, found in enumerate(ndimage.find_objects(instances, max_label=len(labels))):
        if found is not None:
            rows, columns = found
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
            kept.append(number)
    return Scene(
        image=(canvas * 255).round().clip(0, 255).astype(np.uint8),
        label_map=label_map,
        instances=instances,
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=np.asarray([labels[number] for number in kept], np.int64),
        sides=np.asarray([placed[number][2] / size for number in kept], np.float32),
        tints=np.asarray([tints[number] for number in kept], np.float32).reshape(-1, 3),
    )


def _draw_side(rng: np.random.Generator, look: SceneLook) -> int:
    """Return the side of a product's tile in pixels."""
    return min(look.size, max(8, round(rng.uniform(*look.scale) * look.size)))


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
