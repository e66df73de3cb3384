"""Images of coloured darts and kites with every label of objects and images, in the formats that users have."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
SHAPES = {
    # tip, left, tail, right, in units of the size, pointing up
    "dart": ((0.0, -1.0), (-0.75, 0.8), (0.0, 0.25), (0.75, 0.8)),
    "kite": ((0.0, -0.8), (-0.6, -0.35), (0.0, 1.05), (0.6, -0.35)),
}
POINTS = ["tip", "left_corner", "tail", "right_corner"]
COLORS = {"red": (220, 60, 50), "green": (60, 190, 80), "blue": (70, 90, 230)}
ATTRIBUTES = [*(f"has_{name}" for name in (*SHAPES, *COLORS)), "crowded"]
UNKNOWN = 0.2  # of the attributes and numbers


def write_shapes(folder: Path, train: int = 1500, test: int = 200, seed: int = 0) -> None:
    """Write images/PART/N.png, PART.json (COCO), PART_attributes.csv, PART_numbers.jsonl and marks/PART/IDENTITY/N.png.

    Args:
        folder: the folder; it is created.
        train: training images.
        test: test images.
        seed: seed of the images.
    """
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        for label, name in enumerate(SHAPES, 1):
            content["categories"].append({"id": label, "name": name, "keypoints": POINTS, "skeleton": []})
        attributes, numbers = [], []
        for index in range(count):
            image, objects, colors = _scene(random)
            file = f"{index:05d}.png"
            image.save(folder / "images" / part / file)
            content["images"].append({"id": index, "file_name": file, "height": SIDE, "width": SIDE})
            for annotation in objects:
                number = len(content["annotations"]) + 1
                content["annotations"].append({**annotation, "id": number, "image_id": index, "iscrowd": 0})
            names = {f"has_{list(SHAPES)[o['category_id'] - 1]}" for o in objects} | {f"has_{c}" for c in colors}
            true = names | ({"crowded"} if len(objects) > 2 else set())
            attributes.append([file, *("" if random.random() < UNKNOWN else int(a in true) for a in ATTRIBUTES)])
            covered = 100 * sum(o["area"] for o in objects) / SIDE**2
            numbers.append({"image": file, "objects": len(objects), "covered": round(covered, 2)})
            if random.random() < UNKNOWN:
                numbers[-1]["covered"] = None
        (folder / f"{part}.json").write_text(json.dumps(content))
        with (folder / f"{part}_attributes.csv").open("w", newline="") as table:
            csv.writer(table).writerows([["image", *ATTRIBUTES], *attributes])
        (folder / f"{part}_numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
        _write_marks(folder / "marks" / part, random, 60 if part == "train" else 20, max(count // 60, 4))


def _background(random: np.random.Generator, side: int) -> Image.Image:
    coarse = random.integers(60, 150, (5, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _scene(random: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]], set[str]]:
    """Return an image, COCO's annotations of its objects, and their colours; objects hardly overlap."""
    image = _background(random, SIDE)
    draw = ImageDraw.Draw(image)
    objects: list[dict[str, Any]] = []
    colors, centres = set(), []
    for _ in range(int(random.integers(1, 4))):
        label = int(random.integers(len(SHAPES)))
        size = random.uniform(9, 15)
        for _ in range(20):
            centre = random.uniform(1.1 * size, SIDE - 1.1 * size, 2)
            if all(np.hypot(*(centre - other)) > size + radius for other, radius in centres):
                break
        else:
            continue
        centres.append((centre, size))
        angle = random.uniform(-0.8, 0.8)  # so that left and right can be told apart
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        outline = (np.array(list(SHAPES.values())[label]) * size) @ turn.T + centre  # (4, 2)
        color = str(random.choice(list(COLORS)))
        colors.add(color)
        draw.polygon([tuple(p - 0.5) for p in outline], fill=COLORS[color])  # Pillow counts from centres of pixels
        low, high = outline.min(0), outline.max(0)
        x, y = outline.T
        area = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
        objects.append({
            "category_id": label + 1,
            "bbox": [*low.round(2).tolist(), *(high - low).round(2).tolist()],
            "area": round(area, 2),
            "segmentation": [outline.round(2).ravel().tolist()],
            "keypoints": np.column_stack([outline.round(2), np.full(4, 2)]).ravel().tolist(),
            "num_keypoints": 4,
        })  # fmt: skip
    return image, objects, colors


def _write_marks(folder: Path, random: np.random.Generator, identities: int, images: int) -> None:
    """Write images of marks, each identity a random pattern in two colours, turned, scaled and moved at random."""
    for identity in range(identities):
        own = folder / f"mark{identity:03d}-{int(random.integers(1000))}"
        own.mkdir(parents=True, exist_ok=True)
        half = random.integers(0, 2, (4, 2))
        pattern = np.concatenate([half, random.integers(0, 2, (4, 2))], axis=1)
        pair = random.integers(0, 256, (2, 3), dtype=np.uint8)
        tile = Image.fromarray(pair[pattern]).resize((32, 32), Image.Resampling.NEAREST).convert("RGBA")
        for number in range(images):
            image = _background(random, 40)
            side = int(random.integers(22, 32))
            turned = tile.resize((side, side)).rotate(random.uniform(-20, 20), expand=True)
            room = 40 - turned.width
            image.paste(turned, tuple(int(v) for v in random.integers(min(room, 0), max(room, 0) + 1, 2)), turned)
            image.save(own / f"{number}.png")
