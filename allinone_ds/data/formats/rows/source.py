"""What the formats whose samples are rows have in common in a run's file."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from allinone_ds.data.base import SourceConfig
from allinone_ds.data.formats.common.class_names import ClassNames
from allinone_ds.data.formats.common.mask_values import MaskValues
from allinone_ds.data.formats.common.object_parts import OBJECT_KINDS
from allinone_ds.data.formats.maps.values import DENSE_KINDS, MapValues
from allinone_ds.data.formats.rows.columns import COLUMNS, Columns
from allinone_ds.errors import ConfigError


class RowsSource(MapValues, MaskValues, SourceConfig):
    """Base of the sources with columns; a subclass adds where the rows are and implements `open`."""

    kind: Literal[
        "classification", "detection", "segmentation", "depth", "normals", "edges", "saliency", "attributes",
        "regression", "retrieval", "keypoints", "instances",
    ]  # fmt: skip
    """What the samples carry."""
    columns: Columns = Columns()
    """Names of the columns."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; null reads them from the columns."""
    bbox_format: Literal["coco", "pascal"] = "coco"
    """coco: x, y, width, height; pascal: x1, y1, x2, y2. In pixels."""
    absent: Literal[0, -1] = 0
    """Attributes: the value of an attribute that an image does not have, as in `image_table`."""
    flip_pairs: list[tuple[int, int]] | None = None
    """Keypoints: numbers (from 0) of the points that a mirrored image swaps."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> RowsSource:
        """Refuse options of other kinds, which would change nothing."""
        for option, kinds in {
            "bbox_format": OBJECT_KINDS,
            "ignore_index": ("segmentation",),
            "class_ids": ("segmentation",),
            "class_colors": ("segmentation",),
            "ignore_colors": ("segmentation",),
            "absent": ("attributes",),
            "flip_pairs": ("keypoints",),
        }.items():
            if self.kind not in kinds and getattr(self, option) != type(self).model_fields[option].default:
                of = " and ".join(kinds)
                raise ConfigError(f"{option} is an option of kind {of}, the kind is {self.kind}; remove it")
        used = COLUMNS[self.kind]
        for column in Columns.model_fields:
            if column not in used and getattr(self.columns, column) != Columns.model_fields[column].default:
                raise ConfigError(f"columns.{column} is not used by kind {self.kind}, which has {', '.join(used)}")
        if self.kind in DENSE_KINDS and (self.first_id or self.classes is not None):
            raise ConfigError(f"first_id and classes number classes, {self.kind} has none; remove them")
        self.refuse_unused(self.kind)
        return self
