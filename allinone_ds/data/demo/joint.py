"""The joint demo data: every scene with all of its labels, which the composer knows."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pydantic import Field, PositiveInt
from scipy import ndimage

from allinone_ds.data.demo.folders import save_picture
from allinone_ds.data.demo.marker import folder_to_fill
from allinone_ds.data.demo.scenes import (
    IGNORE,
    SPLITS,
    Advance,
    Pixels,
    Pool,
    Rngs,
    Scene,
    SceneLook,
    compose_scene,
    load_pool,
)
from allinone_ds.strict import Strict

DEPTH_SCALE = 0.001
"""Metres per unit of the stored depth maps; 0 stands for pixels without a depth."""
POINTS = ("left", "top", "right", "bottom")
"""Keypoints of a product: where the row and the column through the middle of its visible part leave it. The outermost
points would have no definite place on a straight side."""
COLOURS = ("reddish", "greenish", "bluish")
_CLEAR = 0.08  # distance from the largest to the next factor of a tint from which its colour has a name


class JointSizes(Strict):
    """Number of images of the joint demo, and their look.

    Example:
        >>> JointSizes(train=100).look.objects
        (1, 3)
    """

    train: PositiveInt = 2400
    """Images to train on."""
    test: PositiveInt = 300
    """Images to evaluate on."""
    look: SceneLook = Field(
        default=SceneLook(size=64, objects=(1, 3), scale=(0.25, 0.75), overlap=0.3, nearest_last=True)
    )
    """Content of the scenes."""


def make_joint_demo_data(
    root: Path,
    seed: int = 0,
    sizes: JointSizes | None = None,
    progress: bool = True,
    pools: Mapping[str, Pool] | None = None,
) -> Path:
    """Write the joint demo data, unless `root` already contains it.

    For each split: `images/` (jpg); of the same names `label_maps/` (classes, 255: none), `depth/` (16-bit png in mm,
    0: no value, as everywhere in the background), `edges/` (255: outline of a product), `saliency/` (255: product,
    128: blended with the background); `objects.json` (COCO: boxes, masks, keypoints); `table.csv` (`image`, one column
    of 0 and 1 per class and colour, empty where a colour is not clear, and `count`). And `classes.txt`, the names in
    the label maps.

    Args:
        root: folder to write to; it is created if necessary.
        seed: seed of the scenes; equal seeds give equal files.
        sizes: number of images, and their look; None is that of the demo.
        progress: show a progress bar.
        pools: products and backgrounds by split, instead of those that come with the package.

    Returns:
        The folder.

    Raises:
        FileExistsError: a folder to be written exists, and is not demo data.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     made = make_joint_demo_data(Path(root), sizes=JointSizes(train=2, test=1), progress=False)
        ...     sorted(path.name for path in (made / "train").iterdir())
        ['depth', 'edges', 'images', 'label_maps', 'objects.json', 'saliency', 'table.csv']
    """
    from rich.progress import Progress

    root, sizes = Path(root), sizes or JointSizes()
    wanted = {"version": 2, "seed": seed, "sizes": sizes.model_dump(mode="json")}
    with folder_to_fill(root, wanted, SPLITS) as new, Progress(disable=not progress, transient=True) as bar:
        for number, split in enumerate(SPLITS if new else ()):
            count = getattr(sizes, split)
            row = bar.add_task(f"composing {split}", total=count)
            rngs = (np.random.default_rng([seed, number, i]) for i in range(count))
            pool = pools[split] if pools else load_pool(split)
            _write_split(root / split, pool, sizes.look, rngs, partial(bar.advance, row))
    return root


def _write_split(folder: Path, pool: Pool, look: SceneLook, rngs: Rngs, advance: Advance) -> None:
    maps = ("label_maps", "depth", "edges", "saliency")
    for kind in ("images", *maps):
        (folder / kind).mkdir(parents=True)
    (folder.parent / "classes.txt").write_text("\n".join(["background", *pool.classes]) + "\n")
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", *pool.classes, *COLOURS, "count"])
        for i, rng in enumerate(rngs):
            scene, name = compose_scene(rng, pool, look), f"{i:06d}"
            save_picture(scene.image, folder / "images" / f"{name}.jpg")
            pixels: list[NDArray[Any]] = [scene.label_map, depth_map(scene), *_outlines(scene)]
            for kind, values in zip(maps, pixels, strict=True):
                Image.fromarray(values).save(folder / kind / f"{name}.png", compress_level=1)
            images.append({"id": i, "file_name": f"{name}.jpg", "width": look.size, "height": look.size})
            objects += [
                {"id": len(objects) + n, "image_id": i, **of_one} for n, of_one in enumerate(_objects(scene), 1)
            ]
            present = np.isin(np.arange(len(pool.classes)), scene.labels).astype(int)
            table.writerow([f"{name}.jpg", *present, *_colours(scene), len(scene.labels)])
            advance()
    points = {"keypoints": list(POINTS), "skeleton": [[1, 2], [2, 3], [3, 4], [4, 1]]}
    categories = [{"id": k + 1, "name": name, **points} for k, name in enumerate(pool.classes)]
    (folder / "objects.json").write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )


def depth_map(scene: Scene) -> NDArray[np.uint16]:
    """Return the depth of every product's pixels in units of `DEPTH_SCALE` (H, W), 0 for all others.

    A product whose tile is as wide as the image is at 1 m, one of half the width at 2 m. How far away the photo in the
    background was taken is not known.
    """
    depth = np.zeros(scene.instances.shape)
    for number, side in zip(_visible(scene), scene.sides, strict=True):
        depth[scene.instances == number] = 1 / side
    depth[scene.label_map == IGNORE] = 0
    return (depth / DEPTH_SCALE).round().astype(np.uint16)


def _outlines(scene: Scene) -> tuple[Pixels, Pixels]:
    """Return the edges (255 on the outline of a product) and the saliency (255 on a product, 128 where unclear)."""
    edges = scene.instances != ndimage.grey_erosion(scene.instances, size=(3, 3), mode="nearest")
    saliency = np.where(scene.instances > 0, 255, 0)
    saliency[scene.label_map == IGNORE] = 128
    return edges.astype(np.uint8) * 255, saliency.astype(np.uint8)


def _objects(scene: Scene) -> list[dict[str, Any]]:
    """Return the COCO annotation of each product."""
    annotations = []
    for number, (x1, y1, x2, y2), label in zip(
        _visible(scene), scene.boxes.tolist(), scene.labels.tolist(), strict=True
    ):
        inside = scene.instances == number
        encoded = rle.encode(np.asfortranarray(inside.astype(np.uint8)))
        rows, columns = np.nonzero(inside)
        points = [value for x, y in points_of(rows, columns) for value in (x, y, 2.0)]
        annotations.append(
            {
                "category_id": label + 1,
                "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(inside.sum()),
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                "keypoints": points,
                "num_keypoints": len(POINTS),
            }
        )
    return annotations


def points_of(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[tuple[float, float]]:
    """Return x and y of the `POINTS` of a product, in pixels.

    Args:
        rows: (n,) rows of the pixels of its visible part.
        columns: (n,) their columns.
    """
    row = rows[np.abs(rows - rows.mean()).argmin()]
    column = columns[np.abs(columns - columns.mean()).argmin()]
    across, down = columns[rows == row], rows[columns == column]
    places = [(across.min(), row), (column, down.min()), (across.max(), row), (column, down.max())]
    return [(float(x) + 0.5, float(y) + 0.5) for x, y in places]


def _colours(scene: Scene) -> list[int | str]:
    """Return for each colour whether a product has it; "" where it is not clear."""
    largest, order = np.sort(scene.tints, axis=1), scene.tints.argmax(1)
    clear = largest[:, 2] - largest[:, 1] >= _CLEAR
    columns: list[int | str] = []
    for colour in range(len(COLOURS)):
        if (clear & (order == colour)).any():
            columns.append(1)
        else:
            columns.append(0 if clear.all() else "")
    return columns


def _visible(scene: Scene) -> list[int]:
    """Return the number of each visible product in `instances`, in the order of the boxes."""
    return [int(number) for number in np.unique(scene.instances) if number]
