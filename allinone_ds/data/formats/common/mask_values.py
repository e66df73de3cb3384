"""How label maps store classes: as ids or as colours. The keys of all formats that have label maps."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from allinone_ds.data.base import IGNORE, Problem
from allinone_ds.data.formats.common.masks import (
    color_number,
    color_text,
    colors_to_labels,
    ids_to_labels,
    single_class_warning,
    validate_class_ids,
)
from allinone_ds.data.images import read_color_map, read_label_map
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import Strict

Color = Annotated[int, BeforeValidator(color_number)]
"""A colour as one number, see `color_number`."""
Ids = Annotated[int | list[int], BeforeValidator(lambda value: _id_or_ids(value))]
"""A stored value, or a list of stored values."""
IgnoredIds = Annotated[int | list[int], BeforeValidator(lambda value: _id_or_ids(value, least=None))]
"""The same of pixels without a class, which some files store as -1."""
_OF_IDS = ("class_ids", "first_id", "ignore_index")


class MaskValues(Strict):
    """What the pixels of label maps stand for.

    Example:
        >>> MaskValues(class_ids=[[1, 8], 2], ignore_index=[0, 255]).ignored
        [0, 255]
    """

    ignore_index: IgnoredIds = IGNORE
    """Segmentation: stored value of the pixels without a class, or a list of such values."""
    first_id: int = Field(default=0, ge=0)
    """Id of the first class: 1 if 0 stands for pixels without a class (ADE20K, with `ignore_index: 0`)."""
    class_ids: list[Ids] | None = None
    """Segmentation: id of each class where they do not count up, e.g. [0, 255]; a list among them makes several ids one
    class, e.g. [[1, 8], 2]; null: they count from `first_id`. An id in it is a class even if it equals `ignore_index`.
    """
    class_colors: list[Color] | None = Field(default=None, min_length=1)
    """Segmentation: colour of each class, "#rrggbb" or [red, green, blue], for label maps whose colours are the
    classes; null: the value of a pixel is its class id."""
    ignore_colors: list[Color] = Field(default=[])
    """Segmentation: colours of the pixels without a class."""

    @model_validator(mode="after")
    def _one_numbering(self) -> MaskValues:
        if self.class_ids is not None and self.first_id:
            raise ConfigError("'class_ids' and 'first_id' are both set; remove 'first_id'")
        if self.class_colors is None:
            if self.ignore_colors:
                raise ConfigError("ignore_colors without class_colors: give the colours of the classes too")
            return self
        # compared by value: a run's file holds defaults too
        ids = [name for name in _OF_IDS if getattr(self, name) != MaskValues.model_fields[name].default]
        if ids:
            raise ConfigError(f"'{ids[0]}' is for label maps of ids, 'class_colors' for label maps of colours; remove "
                              "one of them")  # fmt: skip
        colors = Counter([*self.class_colors, *self.ignore_colors])
        twice = [color_text(color) for color, count in colors.items() if count > 1]
        if twice:
            raise ConfigError(f"class_colors, ignore_colors: {', '.join(twice)} is listed more than once; give each "
                              "class a colour of its own")  # fmt: skip
        return self

    @property
    def ignored(self) -> list[int]:
        """Stored values of the pixels without a class."""
        return self.ignore_index if isinstance(self.ignore_index, list) else [self.ignore_index]

    def mask_values(self) -> dict[str, Any]:
        """Return these keys alone."""
        return {name: getattr(self, name) for name in MaskValues.model_fields}

    def fit_classes(self, name: str, classes: int) -> None:
        """Compare the ids or colours with the number of classes.

        Raises:
            DataError: they do not fit; the message names the data set `name`.
        """
        if self.class_colors is None:
            validate_class_ids(name, classes, self.first_id, self.ignored, self.class_ids)
        elif len(self.class_colors) != classes or classes > IGNORE:
            raise DataError(f"{name}: class_colors has {len(self.class_colors)} colours for {classes} "
                            "classes; give each class one colour, at most 255")  # fmt: skip

    def read_mask(self, path: str, labels: np.ndarray, data: bytes | None = None) -> np.ndarray:
        """Return the mask of a label map, uint8 (H, W) of 0..K-1 and 255.

        Args:
            path: the file, which errors name.
            labels: uint8 (K,), the label of each class in the order of the ids or colours.
            data: the content of the file, if it comes from elsewhere.

        Raises:
            BrokenSample: the label map cannot be read, or contains a value or colour that stands for nothing.
        """
        if self.class_colors is not None:
            stored = read_color_map(path, data)
            return colors_to_labels(stored, path, labels, self.class_colors, self.ignore_colors)
        return ids_to_labels(read_label_map(path, data), path, labels, self.ignored, self.first_id, self.class_ids)

    def single_class(self, dataset: Any) -> list[Problem]:
        """Return `single_class_warning` of a dataset."""
        if self.class_colors is None:
            return single_class_warning(dataset, ", ".join(map(str, self.ignored)))
        ignored = ", ".join(map(color_text, self.ignore_colors))
        return single_class_warning(dataset, ignored, "list it in class_colors") if ignored else []


def _id_or_ids(value: Any, least: int | None = 0) -> Any:
    several = value if isinstance(value, list) else [value]
    if not all(type(number) is int and (least is None or number >= least) for number in several):
        allowed = "a whole number" if least is None else f"a whole number of {least} or more"
        raise ConfigError(f"{value!r}: give {allowed}, or a list of such numbers")
    return value
