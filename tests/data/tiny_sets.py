"""What the tiny datasets of the tests are made of."""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
COUNT = 7
CLASSES = ["ant", "bee", "cow"]


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Random smooth-free uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_images(folder: Path, count: int = COUNT, suffix: str = ".png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(pixels(i)).save(folder / name)
    return names


def coco_content() -> dict:
    """One box an image, category ids 7, 20, 90 (not contiguous), image ids 100, 101, ..."""
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
