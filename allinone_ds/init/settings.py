"""Sizes of a first run: image sizes that fit the pictures, batches and steps that fit the machine."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.formats.maps.values import DENSE_KINDS
from allinone_ds.data.images import image_size
from allinone_ds.errors import BrokenSample

_SAMPLES = 200  # images whose size is read
_DECODED = 20  # images that are decoded at most
_VISIBLE = 8  # pixels of the shorter side, below which an object is hardly learned


@dataclass(frozen=True)
class Machine:
    """What a first run may use on one kind of machine.

    Example:
        >>> machine_settings(gpu=False).patch
        8
    """

    patch: int
    """Patch size of the backbone in pixels."""
    sides: dict[str, int]
    """{kind: longest side of the network's input in pixels}."""
    batches: dict[str, int]
    """{kind: images per rank and micro-step}."""
    steps: tuple[int, int]
    """Fewest and most optimizer steps."""


def machine_settings(gpu: bool) -> Machine:
    """Return the settings for a machine with or without a GPU."""
    sides = {"detection": 644, "segmentation": 518, "classification": 224}
    batches = {"detection": 8, "segmentation": 8, "classification": 32}
    steps = 500, 20_000
    if not gpu:
        sides = {"detection": 128, "segmentation": 96, "classification": 64}
        batches = {"detection": 4, "segmentation": 4, "classification": 16}
        steps = 100, 1000
    alike = {"segmentation": DENSE_KINDS, "detection": ("instances", "keypoints"),
             "classification": ("attributes", "regression", "retrieval")}  # fmt: skip
    for kind, others in alike.items():
        sides |= dict.fromkeys(others, sides[kind])
        batches |= dict.fromkeys(others, batches[kind])
    return Machine(14 if gpu else 8, sides, batches, steps)


def typical_size(dataset: SampleDataset) -> tuple[int, int] | None:
    """Return the median height and width of the images of a dataset in pixels; None if none can be read."""
    sizes: list[tuple[int, int]] = []
    decoded = 0
    for index in range(0, len(dataset), max(len(dataset) // _SAMPLES, 1)):
        size = image_size(dataset.path(index))
        if size is None and decoded < _DECODED:
            decoded += 1
            try:
                size = tuple(dataset[index]["image"].shape[-2:])
            except BrokenSample:
                continue
        if size is not None:
            sizes.append(size)
    if not sizes:
        return None
    return round(median(h for h, _ in sizes)), round(median(w for _, w in sizes))


def input_size(size: tuple[int, int], longest: int, patch: int) -> tuple[int, int]:
    """Return the size that images are resized to: the aspect of `size`, whole patches, and no enlargement beyond them.

    Args:
        size: (H, W) of the images in pixels.
        longest: longest side in pixels.
        patch: patch size in pixels.

    Example:
        >>> input_size((480, 640), longest=128, patch=8), input_size((28, 28), longest=64, patch=8)
        ((96, 128), (32, 32))
    """
    scale = min(longest / max(size), 1.0)
    limit = longest // patch * patch
    height, width = (min(max(round(side * scale / patch), 2) * patch, limit) for side in size)
    return height, width


def small_objects(dataset: SampleDataset, target: tuple[int, int]) -> list[str]:
    """Return a note if many objects are hardly visible after resizing.

    Args:
        dataset: a detection dataset; some of its images are decoded.
        target: (H, W) that images are resized to.
    """
    sides: list[float] = []
    for index in range(0, len(dataset), max(len(dataset) // _DECODED, 1)):
        try:
            sample = dataset[index]
        except BrokenSample:
            continue
        H, W = sample["image"].shape[-2:]
        sizes = (sample["boxes"][:, 2:] - sample["boxes"][:, :2]).tolist()
        sides += [min(w * target[1] / W, h * target[0] / H) for w, h in sizes]
    small = sum(side < _VISIBLE for side in sides)
    if 4 * small < len(sides) or not small:
        return []
    share = f"{small} of {len(sides)} objects that were looked at are smaller than {_VISIBLE} pixels"
    return [f"{share} when images are resized to {target[0]} x {target[1]}; enlarge image_size to find them"]


def steps_for(samples: int, batch: int, machine: Machine, epochs: int = 30) -> int:
    """Return optimizer steps of `epochs` epochs, within the limits of the machine, a multiple of 10."""
    fewest, most = machine.steps
    return min(max(-(-samples * epochs // batch) // 10 * 10, fewest), most)
