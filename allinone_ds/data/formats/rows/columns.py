"""Columns and cells of a table of samples."""

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
    """Classification and retrieval: the class or identity, an integer, a ClassLabel or a name."""
    objects: str = "objects"
    """Detection, instances and keypoints: the annotations of one image."""
    bbox: str = "bbox"
    """The box, inside `objects`."""
    category: str = "category"
    """The class of the box, inside `objects`."""
    iscrowd: str = "iscrowd"
    """Whether the box is a crowd, inside `objects`. The column is optional."""
    segmentation: str = "segmentation"
    """Instances: polygons or run lengths, inside `objects`."""
    keypoints: str = "keypoints"
    """Keypoints: x, y and visibility of every point, inside `objects`."""
    area: str = "area"
    """Keypoints: the area of the object, inside `objects`. The column is optional."""
    attributes: list[str] | None = None
    """Attributes: their columns; null is all of numbers and booleans."""
    values: list[str] = ["value"]
    """Regression: the columns of the numbers."""
    label_map: str = "label"
    """Segmentation: the label map, an image of class ids."""
    map: str = "map"
    """Depth, normals, edges and saliency: the map, an image, or a list of rows of numbers."""


COLUMNS = {
    "classification": ("image", "label"),
    "retrieval": ("image", "label"),
    "attributes": ("image", "attributes"),
    "regression": ("image", "values"),
    "detection": ("image", "objects", "bbox", "category", "iscrowd"),
    "instances": ("image", "objects", "bbox", "category", "iscrowd", "segmentation"),
    "keypoints": ("image", "objects", "bbox", "category", "iscrowd", "keypoints", "area"),
    "segmentation": ("image", "label_map"),
    **dict.fromkeys(DENSE_KINDS, ("image", "map")),
}
"""The columns of each kind: the image first, the target or what holds it second."""


def element_of(feature: Any) -> Any:
    """Return the element type of a list feature, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def of_objects(cell: Any, column: str) -> list[Any]:
    """Return a column of the objects of one image, a dict of lists or a list of dicts; empty if there is none."""
    if isinstance(cell, Mapping):
        return list(cell.get(column) or [])
    found = [(one or {}).get(column) for one in cell or []]
    return [] if all(value is None for value in found) else found


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
