"""Segmentation from png label maps: one map beside every image."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torchvision import tv_tensors

from allinone_ds.data.base import (
    IGNORE,
    ClassNames,
    Problem,
    Sample,
    SampleDataset,
    SourceConfig,
    match_classes,
    need_folder,
    read_classes,
)
from allinone_ds.data.images import orphans, read_image, read_label_map, walk_images
from allinone_ds.errors import BrokenSample, DataError


class LabelMapsSource(SourceConfig):
    """Images and label maps of the same names, but for suffixes (`a/1.jpg` belongs to `a/1.png`)."""

    format: Literal["label_maps"]
    images: str
    """Folder of the images."""
    label_maps: str
    """Folder of the label maps: one channel, the pixel's value is its class id."""
    label_map_suffix: str = ""
    """What a label map's name has after its image's: with "_train_id", `a/1.jpg` belongs to `a/1_train_id.png`."""
    image_suffix: str = ""
    """Likewise of an image's name: Cityscapes has "_leftImg8bit", and "_gtFine_labelTrainIds" for its label maps."""
    classes: ClassNames
    """Class names by id, or a text file with one name a line; at most 255."""
    ignore_index: int = Field(255, ge=0)
    """Value of pixels without a class."""
    first_id: int = Field(0, ge=0)
    """Id of the first class: 1 where 0 stands for pixels without one (ADE20K, with `ignore_index: 0`)."""


class LabelMapsDataset(SampleDataset):
    """Every image below a folder with the label map of the same relative path and stem.

    In the sample's mask, ignored pixels are 255 whatever the files use.

    Args:
        source: folders, class names, values of pixels.
        root: what relative paths start at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a missing folder or more than 255 classes; in strict mode also for images
            without map, maps without image, two files of one stem, or no image at all.
    """

    kind = "segmentation"

    def __init__(self, source: LabelMapsSource, root: Path, classes: list[str] | None = None, strict: bool = True):
        self.images = root / source.images
        self.maps = root / source.label_maps
        self.name = str(self.maps)
        self.source = source
        need_folder(self.images, "images")
        need_folder(self.maps, "label_maps")
        names = read_classes(source.classes, root) or []
        check_ids(self.name, len(names), source.first_id, source.ignore_index)
        places = match_classes(self.name, names, classes)
        self.classes = names if classes is None else list(classes)
        self._lookup = np.array([places[i] for i in range(len(names))], dtype=np.uint8)
        self.structural: list[Problem] = []
        self._pair()
        self.structural += lone_class(self, source.ignore_index)
        self.settle(strict)

    def _pair(self) -> None:
        """Sets `pairs`: (image, label map) relative to their folders, for every image."""
        images = self._by_stem(self.images, self.source.image_suffix)
        maps = self._by_stem(self.maps, self.source.label_map_suffix)
        self.pairs = [(images[stem], maps[stem]) for stem in images if stem in maps]
        for stem in images.keys() - maps.keys():
            place = f"{self.maps / stem}{self.source.label_map_suffix}.png"
            reason = f"has no label map {place}; add the map or remove the image"
            self.structural.append(Problem(str(self.images / images[stem]), reason))
        for stem in maps.keys() - images.keys():
            reason = f"has no image {self.images / stem}{self.source.image_suffix}.*; add the image or remove the map"
            self.structural.append(Problem(str(self.maps / maps[stem]), reason))
        self.structural.sort()

    def _by_stem(self, folder: Path, suffix: str) -> dict[str, str]:
        """{path without suffixes: path} of the pictures below a folder; two of one stem are a fault."""
        groups: dict[str, list[str]] = defaultdict(list)
        others = []
        for file in walk_images(folder):
            stem = os.path.splitext(file)[0]
            if stem.endswith(suffix):
                groups[stem.removesuffix(suffix)].append(file)
            else:
                others.append(file)
        self.structural += orphans(folder, others, f"whose names do not end with '{suffix}'")
        for files in groups.values():
            if len(files) > 1:
                reason = f"there is also {', '.join(files[1:])}; keep one file of a name"
                self.structural.append(Problem(str(folder / files[0]), reason))
        return {stem: files[0] for stem, files in groups.items()}

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, index: int) -> str:
        return os.path.join(self.images, self.pairs[index][0])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        mask = self.mask(index)
        check_size(mask, image, self._map_path(index))
        return {
            "image": image,
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "path": path,
            "index": index,
        }

    def mask(self, index: int) -> np.ndarray:
        """Labels (H, W) of one sample, uint8, without its image.

        Raises:
            BrokenSample: the label map cannot be read, or holds what is no class.
        """
        path = self._map_path(index)
        return class_ids(read_label_map(path), path, self._lookup, self.source.ignore_index, self.source.first_id)

    def _map_path(self, index: int) -> str:
        return os.path.join(self.maps, self.pairs[index][1])


def check_ids(name: str, classes: int, first_id: int, ignore_index: int) -> None:
    """Raises `DataError` for a number of classes, or an ignored value, that label maps cannot have."""
    if not 1 <= classes <= IGNORE or first_id <= ignore_index < first_id + classes:
        raise DataError(
            f"{name}: {classes} classes from id {first_id} on, with ignore_index {ignore_index}; "
            "give 1 to 255 classes, and an ignore_index that is not the id of one"
        )


def class_ids(stored: np.ndarray, path: str, lookup: np.ndarray, ignore_index: int, first_id: int = 0) -> np.ndarray:
    """Turns stored numbers into labels.

    Args:
        stored: integers (H, W).
        path: the file that errors name.
        lookup: uint8 (K,), label of each class in the order of their stored ids.
        ignore_index: stored number of pixels without a class.
        first_id: stored number of the first class.

    Returns:
        uint8 (H, W), 0..K-1 or 255

    Raises:
        BrokenSample: a number is neither a class id nor `ignore_index`.
    """
    last_id = first_id + len(lookup) - 1
    ignored = stored == ignore_index
    wrong = ((stored < first_id) | (stored > last_id)) & ~ignored
    if wrong.any():
        found = ", ".join(str(v) for v in np.unique(stored[wrong])[:5])
        raise BrokenSample(
            path,
            f"holds {found} in {int(wrong.sum())} pixels; "
            f"allowed are {first_id}..{last_id} and {ignore_index} (ignore); correct the map, 'classes', 'first_id' or "
            "'ignore_index'",
        )
    mask = lookup[np.where(ignored, 0, stored - first_id)]
    mask[ignored] = IGNORE
    return mask


def lone_class(dataset: Any, ignore_index: int) -> list[Problem]:
    """A warning when label maps of several classes hold one class and ignored pixels: maps of 0 and 255 for two
    classes, whose second one would be ignored, and learning and mIoU would be perfect.

    Args:
        dataset: label maps, read by its method `mask`; eight of them are looked at.
        ignore_index: as the files use it.
    """
    found: set[int] = set()
    for index in np.linspace(0, len(dataset) - 1, min(8, len(dataset))).astype(int).tolist():
        with contextlib.suppress(BrokenSample):
            found |= set(np.unique(dataset.mask(index)).tolist())
    if len(dataset.classes) == 1 or IGNORE not in found or len(found) != 2:
        return []
    name = dataset.classes[min(found)]
    reason = (
        f"label maps that were looked at hold no class but '{name}', all else is {ignore_index}, which is ignored; if "
        f"{ignore_index} is to be a class, write its id there"
    )
    return [Problem(dataset.name, reason, "warning")]


def check_size(mask: np.ndarray, image: torch.Tensor, path: str) -> None:
    """Raises `BrokenSample` when a mask (H, W) is not as large as its image (3, H, W)."""
    if mask.shape != image.shape[1:]:
        raise BrokenSample(
            path,
            f"is {mask.shape[1]} x {mask.shape[0]} (width x height), "
            f"its image {image.shape[2]} x {image.shape[1]} (upright); write the map in the image's size",
        )
