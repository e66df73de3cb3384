"""Scenes of spheres in a room with exact depth, normals, edges and salient pixels, for the benchmark of these kinds.

A ray per pixel meets the floor, the back wall or one of two to four spheres of random size and place. Light falls
from a random side, far surfaces fade, and the room and all spheres but one are grey: that of a strong colour is
salient. Edges are the outlines of the surfaces.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 80
FOCAL = 70.0  # pixels
MILLIMETRES = 1000.0
_LEAST = 0.01  # fraction of the pixels that are salient


def scene(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return one scene in which the salient sphere can be seen.

    Returns:
        image uint8 (H, W, 3); depth float (H, W) in metres; normals float (H, W, 3): x right, y down, z towards the
        viewer; edges and saliency bool (H, W).
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    rays = np.stack([(x - WIDTH / 2 + 0.5) / FOCAL, (y - HEIGHT / 2 + 0.5) / FOCAL, np.ones_like(x)], axis=-1)
    floor, wall = generator.uniform(0.8, 1.4), generator.uniform(5.0, 8.0)
    with np.errstate(divide="ignore"):
        depth = np.where(rays[..., 1] > 0, floor / rays[..., 1], np.inf)  # (H, W)
    surface = np.where(depth < wall, 1, 0)
    depth = np.minimum(depth, wall)
    away = np.zeros_like(rays)  # normals with z away from the viewer, as the rays count it
    away[surface == 0], away[surface == 1] = (0, 0, -1), (0, -1, 0)
    for number in range(generator.integers(2, 5)):
        radius, distance = generator.uniform(0.3, 0.8), generator.uniform(2.2, 4.6)
        side = distance * WIDTH / 2 / FOCAL
        centre = np.array(
            [generator.uniform(-0.8, 0.8) * side, generator.uniform(-0.3, 1) * (floor - radius), distance]
        )
        a, b = (rays**2).sum(-1), rays @ centre
        inside = b**2 - a * (centre @ centre - radius**2)
        hit = (b - np.sqrt(np.maximum(inside, 0))) / a  # z of the first point on the sphere
        seen = (inside > 0) & (hit > 0.3) & (hit < depth)
        depth[seen], surface[seen] = hit[seen], number + 2
        away[seen] = (rays[seen] * hit[seen, None] - centre) / radius
    if (surface == 2).mean() < _LEAST:
        return scene(generator)
    light = generator.normal(size=3) * [1, 0.5, 0.5] + [0, -1.2, -1.2]
    light /= np.linalg.norm(light)
    colours = np.repeat(generator.uniform(0.45, 0.95, (6, 1)), 3, axis=1)
    colours[2] = np.roll([0.95, generator.uniform(0.1, 0.5), 0.1], generator.integers(3))
    shade = 0.35 + 0.65 * np.clip(away @ light, 0, 1)
    image = colours[surface] * shade[..., None] * np.exp(-depth / 14)[..., None]
    image += generator.normal(scale=0.015, size=image.shape)
    edges = np.zeros(depth.shape, dtype=bool)
    edges[:, 1:] |= surface[:, 1:] != surface[:, :-1]
    edges[1:] |= surface[1:] != surface[:-1]
    return {
        "image": (np.clip(image, 0, 1) * 255).astype(np.uint8),
        "depth": depth,
        "normals": away * [1, 1, -1],
        "edges": edges,
        "saliency": surface == 2,
    }


def write_scenes(folder: Path, train: int = 800, test: int = 100, seed: int = 0) -> None:
    """Write FOLDER/train and FOLDER/test: images, depth (16-bit png in millimetres), normals, edges and saliency (png).

    Args:
        folder: it is created.
        train: number of scenes to train on.
        test: number of other scenes.
        seed: seed of all scenes.
    """
    generator = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        for name in ("images", "depth", "normals", "edges", "saliency"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            made = scene(generator)
            stored = {
                "images": made["image"],
                "depth": np.rint(made["depth"] * MILLIMETRES).astype(np.uint16),
                "normals": np.rint((made["normals"] + 1) * 127.5).astype(np.uint8),
                "edges": made["edges"].astype(np.uint8) * 255,
                "saliency": made["saliency"].astype(np.uint8) * 255,
            }
            for name, values in stored.items():
                Image.fromarray(values).save(folder / part / name / f"{i:04}.png")
