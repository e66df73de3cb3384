"""Build the images that the demo ships with: two tile sheets of Fashion-MNIST and photos of scikit-image.

Only maintainers run this script; its output is in `allinone_ds/data/assets`.

    apt-get install dataset-fashion-mnist && pip install scikit-image
    python tools/make_demo_assets.py
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 28
COLUMNS = 100
PER_CLASS = {"train": 300, "test": 100}
CLASSES = 10
PHOTO_SIDE = 320  # pixels of the shorter side
ASSETS = Path(__file__).parents[1] / "allinone_ds/data/assets"
# The licence of each photo is in its scikit-image docstring and in assets/NOTICE.
PHOTOS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
    ),
    "test": ("clock_motion.png", "coffee.png", "gravel.png", "rocket.jpg"),
}


def read_idx(path: Path) -> np.ndarray:
    """Return the content of a gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", count=dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def tile_sheet(images: np.ndarray, labels: np.ndarray, per_class: int) -> Image.Image:
    """Return a sheet of the first `per_class` photos of each class, sorted by class, with `COLUMNS` per row."""
    chosen = np.concatenate([images[labels == k][:per_class] for k in range(CLASSES)])  # (K * n, 28, 28)
    rows = len(chosen) // COLUMNS
    grid = chosen.reshape(rows, COLUMNS, TILE, TILE).transpose(0, 2, 1, 3)
    return Image.fromarray(grid.reshape(rows * TILE, COLUMNS * TILE))


def main() -> None:
    """Write tiles-{train,test}.png and photos/{train,test}-*.jpg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="its folder")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(args.fashion / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(args.fashion / f"{stem}-labels-idx1-ubyte.gz")
        tile_sheet(images, labels, PER_CLASS[split]).save(args.out / f"tiles-{split}.png", optimize=True)

    import skimage

    source = Path(skimage.__file__).parent / "data"
    for split, names in PHOTOS.items():
        for name in names:
            photo = Image.open(source / name)
            scale = PHOTO_SIDE / min(photo.size)
            size = (round(photo.width * scale), round(photo.height * scale))
            photo = photo.resize(size, Image.Resampling.LANCZOS) if scale < 1 else photo
            photo.save(args.out / f"photo-{split}-{Path(name).stem}.jpg", quality=85)


if __name__ == "__main__":
    main()
