"""Columns and cells of a `datasets` table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from allinone_ds.data.formats.maps.values import DENSE_KINDS
from allinone_ds.data.images import read_map
from allinone_ds.errors import BrokenSample
from allinone_ds.strict import Strict


class Columns(Strict):
    """Names of the columns. The defaults are those of most datasets on the hub.

    Example:
        >>> Columns(image="img", label="fine_label").label
        'fine_label'
    """

    image: str = "image"
    """The image, in every kind."""
    label: str = "label"
    """Classification: the class, an integer, a ClassLabel or a name."""
    objects: str = "objects"
    """Detection: the annotations of one image."""
    bbox: str = "bbox"
    """Detection: the box, inside `objects`."""
    category: str = "category"
    """Detection: the class of the box, inside `objects`."""
    iscrowd: str = "iscrowd"
    """Detection: whether the box is a crowd, inside `objects`. The column is optional."""
    label_map: str = "label"
    """Segmentation: the label map, an image of class ids."""
    map: str = "map"
    """Depth, normals, edges and saliency: the map, an image, or a list of rows of numbers."""


COLUMNS = {
    "classification": ("image", "label"),
    "detection": ("image", "objects", "bbox", "category", "iscrowd"),
    "segmentation": ("image", "label_map"),
    **dict.fromkeys(DENSE_KINDS, ("image", "map")),
}
"""The columns of each kind: the image first, the target or what holds it second."""


def element_of(feature: Any) -> Any:
    """Return the element type of a list feature, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def file_bytes(cell: Any, path: str) -> bytes:
    """Return the encoded bytes in an undecoded image cell."""
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise BrokenSample(path, "has no image; remove the row")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise BrokenSample(path, f"{cell['path']}: cannot be opened: {error.strerror or error}") from None


def stored_map(cell: Any, path: str) -> np.ndarray:
    """Return the stored numbers of a map: of an undecoded image cell, or of rows of numbers."""
    if cell is None or isinstance(cell, Mapping):
        return read_map(path, file_bytes(cell, path))
    try:
        return np.asarray(cell, dtype=np.float32)
    except ValueError:
        raise BrokenSample(path, "has rows of different lengths in its map; give one number per pixel") from None
