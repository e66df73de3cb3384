"""Fixtures: a tiny dataset on disk in each format."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.tiny_sets import CLASSES, COUNT, HEIGHT, WIDTH, coco_content, write_images


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """images/*.png and boxes.json."""
    write_images(tmp_path / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(coco_content()))
    return tmp_path


@pytest.fixture
def maps_root(tmp_path: Path) -> Path:
    """images/*.png and maps/*.png with values 0, 1, 2, 255."""
    write_images(tmp_path / "images")
    (tmp_path / "maps").mkdir()
    values = np.array([0, 1, 2, 255], dtype=np.uint8)
    for i in range(COUNT):
        stored = values[np.random.default_rng(i).integers(0, 4, (HEIGHT, WIDTH))]
        Image.fromarray(stored).save(tmp_path / "maps" / f"{i}.png")
    return tmp_path


@pytest.fixture
def list_root(tmp_path: Path) -> Path:
    """images/*.png and list.txt."""
    names = write_images(tmp_path / "images")
    (tmp_path / "list.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    return tmp_path


@pytest.fixture
def folders_root(tmp_path: Path) -> Path:
    """images/<class>/*.png."""
    for name in CLASSES:
        write_images(tmp_path / "images" / name, 2)
    return tmp_path
