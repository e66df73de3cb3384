"""The demo data of three tasks on disk, each with images and a data format of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allinone_ds.data.demo.marker import folder_to_fill
from allinone_ds.data.demo.scenes import (
    CLASSES,
    IGNORE,
    SPLITS,
    Advance,
    Pixels,
    Pool,
    Rngs,
    SceneLook,
    compose_scene,
    load_pool,
)
from allinone_ds.strict import Strict

TASKS = ("detection", "segmentation", "classification")


class DemoSizes(Strict):
    """Number of images (train, test) per task, and the look of its scenes.

    Example:
        >>> DemoSizes(detection=(100, 10)).detection_look.size
        48
    """

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
class DemoData:
    """The folder of the demo data, and its sources.

    Example:
        >>> DemoData(Path("data")).sources("detection", "test")["annotations"]
        'detection/test.json'
    """

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
    with folder_to_fill(root, wanted, TASKS) as new:
        if new:
            _write(root, seed, sizes, progress, pools)
    return data


def _write(root: Path, seed: int, sizes: DemoSizes, progress: bool, pools: Mapping[str, Pool] | None) -> None:
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


def save_picture(image: Pixels, path: Path) -> None:
    """Write an image (H, W, 3) with hardly any loss."""
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _write_detection(folder: Path, split: str, pool: Pool, look: SceneLook, rngs: Rngs, advance: Advance) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, rng in enumerate(rngs):
        scene = compose_scene(rng, pool, look)
        name = f"{i:06d}.jpg"
        save_picture(scene.image, folder / split / name)
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
        save_picture(scene.image, folder / split / "images" / f"{i:06d}.jpg")
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
        save_picture(scene.image, folder / split / name)
        lines.append(f"{name} {label}\n")
        advance()
    (folder / f"{split}.txt").write_text("".join(lines))


_WRITERS = {
    "detection": _write_detection,
    "segmentation": _write_segmentation,
    "classification": _write_classification,
}
