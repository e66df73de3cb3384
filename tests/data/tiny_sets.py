"""The tiny datasets of the tests: their content, the sources that describe them, and ways to open and check them."""

from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from allinone_ds.data.base import Problem, SampleDataset, SourceConfig
from allinone_ds.data.check import check_sources
from allinone_ds.data.sources import Source, open_source

HEIGHT, WIDTH = 24, 32
COUNT = 7
CLASSES = ["ant", "bee", "cow"]

COCO = {"format": "coco", "images": "images", "annotations": "boxes.json"}
MAPS = {"format": "label_maps", "images": "images", "label_maps": "maps", "classes": CLASSES}
LIST = {"format": "image_list", "images": "images", "list": "list.txt", "classes": CLASSES}
FOLDERS = {"format": "class_folders", "images": "images"}


def source(config: dict) -> SourceConfig:
    return TypeAdapter(Source).validate_python(config)


def opened(config: dict, root: Path, **options) -> SampleDataset:
    return open_source(source(config), root, **options)


def errors(config: dict, root: Path) -> list[Problem]:
    """The errors that the check of all data reports."""
    return [p for p in check_sources({"it": source(config)}, root, progress=False) if p.level == "error"]


def warnings(config: dict, root: Path) -> str:
    """The warnings that the check of all data reports, one per line."""
    problems = check_sources({"it": source(config)}, root, progress=False)
    return "\n".join(str(p) for p in problems if p.level == "warning")


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Random uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_images(folder: Path, count: int = COUNT, suffix: str = ".png") -> list[str]:
    """Write 0.png, 1.png, ... and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(pixels(i)).save(folder / name)
    return names


def coco_content() -> dict:
    """One box per image, category ids 7, 20, 90 (not contiguous), image ids 100, 101, ..."""
    return {
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(COUNT)],
        "annotations": [
            {
                "id": i,
                "image_id": 100 + i,
                "category_id": (7, 20, 90)[i % 3],
                "bbox": [i, 2, 8, 10],
                "iscrowd": 0,
            }
            for i in range(COUNT)
        ],
        "categories": [{"id": i, "name": n} for i, n in zip((90, 7, 20), ("cow", "ant", "bee"), strict=True)],
    }
