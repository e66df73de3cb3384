"""Depth, surface normals, edges or saliency from one file of numbers per image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import model_validator

from allinone_ds.data.base import Problem, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.listing import require_folder
from allinone_ds.data.formats.common.masks import check_mask_size
from allinone_ds.data.formats.common.paired_files import pair_files
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.formats.maps.values import MapValues, as_target, read_values
from allinone_ds.data.images import image_size, read_image, read_map
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import PathText

_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_EXAMINED = 8  # maps that are read when a dataset is opened, if none of those before can be used


class DenseMapsSource(MapValues, SourceConfig):
    """Images and maps of values of equal relative paths except for suffixes (`a/1.jpg` belongs to `a/1.npy`).

    Example:
        >>> source = DenseMapsSource(format="dense_maps", kind="depth", images="images", maps="depth", scale=0.001)
        >>> source.scale, source.invalid, source.maximum
        (0.001, None, None)
    """

    format: Literal["dense_maps"]
    kind: Literal["depth", "normals", "edges", "saliency"]
    """What the maps hold."""
    images: PathText
    """Folder of the images."""
    maps: PathText
    """Folder of the maps: .npy, or png or tiff files of 8, 16 or 32 bits; one number per pixel, three for normals."""
    map_suffix: str = ""
    """What ends the name of a map: with "_depth", `a/1.jpg` belongs to `a/1_depth.png`."""
    image_suffix: str = ""
    """What ends the name of an image, in the same way."""

    @model_validator(mode="after")
    def _of_the_kind(self) -> DenseMapsSource:
        self.refuse_unused(self.kind)
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> DenseMapsDataset:
        return DenseMapsDataset(self, root, classes)


class DenseMapsDataset(SampleDataset):
    """All images below a folder, each with the map of the same relative path, under the name of the kind.

    Args:
        source: folders and how the numbers are read.
        root: folder that relative paths start at.
        classes: class names of the train set, of which there are none.

    Raises:
        DataError: a folder is missing, or there are class names. Images without a map, maps without an image, names
            that are used twice, and maps of which none can be used are kept in `structural`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> source = DenseMapsSource(format="dense_maps", kind="depth", images="images", maps="depth", scale=0.01)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("images", "depth"):
        ...         Path(root, folder).mkdir()
        ...     Image.new("RGB", (2, 1)).save(Path(root, "images", "1.png"))
        ...     np.save(Path(root, "depth", "1.npy"), np.array([[150, 0]], dtype=np.uint16))
        ...     DenseMapsDataset(source, Path(root))[0]["depth"].tolist()
        [[1.5, nan]]
    """

    def __init__(self, source: DenseMapsSource, root: Path, classes: Sequence[str] | None = None):
        self.images, self.maps = root / source.images, root / source.maps
        self.kind, self.source = source.kind, source
        self.name = str(self.maps)
        self.classes = no_classes(self.name, self.kind, classes)
        require_folder(self.images, "images")
        require_folder(self.maps, "maps")
        self.structural: list[Problem]
        pairs, self.structural = pair_files(
            (self.images, source.image_suffix), (self.maps, source.map_suffix), "map", more=(".npy",)
        )
        self.files, self._map_files = Texts(image for image, _ in pairs), Texts(stored for _, stored in pairs)
        self.structural += [*self._lossy(), *self._few_bits(), *self._unusable()]

    def _lossy(self) -> list[Problem]:
        """Return a warning if maps are stored in a format that changes their numbers."""
        lossy = [name for name in self._map_files if os.path.splitext(name)[1].lower() in _LOSSY]
        if not lossy:
            return []
        reason = f"{len(lossy)} of {len(self)} maps are stored in a format that changes their numbers ({lossy[0]}); "
        return [Problem(self.name, reason + "write png, tiff or npy files", "warning")]

    def _few_bits(self) -> list[Problem]:
        """Return a warning if depths have 8 bits, as 16-bit files have after a program that knows no more."""
        if self.kind != "depth" or not self.files:
            return []
        try:
            stored = read_map(self._map_path(0)).dtype
        except BrokenSample:
            return []
        if stored != np.uint8:
            return []
        reason = "the maps have 8 bits, so at most 255 different depths; if the data set has 16 bits, write them again"
        return [Problem(self.name, reason, "warning")]

    def _unusable(self) -> list[Problem]:
        """Return an error if none of some maps can be used: then a key of the source is wrong, not a file."""
        reasons: list[BrokenSample] = []
        for index in np.linspace(0, len(self) - 1, min(_EXAMINED, len(self))).astype(int).tolist():
            try:
                values, size = self.values(index), image_size(self.path(index))
                if size is None or values.shape[-2:] == size:
                    return []
                check_mask_size(values, np.empty((3, *size)), self._map_path(index), "map")
            except BrokenSample as error:
                reasons.append(error)
        if not reasons:
            return []
        others = f" (none of {len(reasons)} maps that were read can be used)" if len(reasons) > 1 else ""
        return [Problem(reasons[0].path, f"{reasons[0].reason}{others}")]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.images, self.files[index])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        values = self.values(index)
        check_mask_size(values, image, self._map_path(index), "map")
        return {"image": image, self.kind: as_target(values, self.kind), "path": path, "index": index}

    def annotation(self, index: int) -> Sample:
        return {self.kind: self.values(index)}

    def values(self, index: int) -> np.ndarray:
        """Return the target of one sample without reading its image, see `read_values`.

        Raises:
            BrokenSample: the map cannot be read, or its numbers are none of the kind.
        """
        path = self._map_path(index)
        return read_values(read_map(path), self.kind, self.source, path)

    def _map_path(self, index: int) -> str:
        return os.path.join(self.maps, self._map_files[index])


def no_classes(name: str, kind: str, classes: Sequence[str] | None) -> list[str]:
    """Return the class names of a kind that has none.

    Raises:
        DataError: the run gives class names.
    """
    if classes:
        raise DataError(f"{name}: {kind} has no classes; remove 'classes' ({', '.join(classes[:5])})")
    return []
