"""Detection from a csv file with one box per row."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.coco import CocoDataset, CocoSource
from allinone_ds.data.formats.common.class_names import sort_key
from allinone_ds.data.formats.common.listing import check_listed_files, require_folder
from allinone_ds.data.formats.common.tables import read_table
from allinone_ds.data.images import image_size
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""Numbers of a box: two corners; a corner and the size; or the centre and the size."""


class BoxTableSource(SourceConfig):
    """A csv file with a row per box, and a row without numbers for an image without objects.

    Example:
        >>> source = BoxTableSource(format="box_table", images="images", table="boxes.csv", fractions=True)
        >>> source.box_columns, source.boxes
        (['x1', 'y1', 'x2', 'y2'], 'xyxy')
    """

    format: Literal["box_table"]
    images: PathText
    """Folder that the files in the table are relative to."""
    table: PathText
    """The csv file. Its first line names the columns."""
    columns: list[str] | None = Field(default=None, min_length=2)
    """Names of the columns of a file without such a line; null: the first line has them."""
    image_column: str = "image"
    """Column of the files."""
    label_column: str | None = "label"
    """Column of the class names; null: all boxes have one class, named by `classes` of the task, or "object"."""
    box_columns: list[str] = Field(default=["x1", "y1", "x2", "y2"], min_length=1, max_length=4)
    """The columns of the four numbers of a box, or one column that holds all four, as "[10, 20, 30, 40]"."""
    boxes: BoxFormat = "xyxy"
    """What the numbers are: "xyxy" (two corners), "xywh" (the upper left corner, width and height) or "cxcywh" (the
    centre, width and height)."""
    fractions: bool = False
    """Whether the numbers are fractions of the width and height of the image instead of pixels."""
    image_suffix: str = ""
    """What is appended to the files, e.g. ".jpg" if the column holds names without a suffix."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between the columns."""

    @model_validator(mode="after")
    def _one_or_four_columns(self) -> BoxTableSource:
        if len(self.box_columns) not in (1, 4) or len(set(self.box_columns)) < len(self.box_columns):
            raise ConfigError(f"box_columns = {self.box_columns}: name four different columns, or one that holds the "
                              "four numbers")  # fmt: skip
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> CocoDataset:
        file, folder = root / self.table, root / self.images
        require_folder(folder, "images")
        table = read_table(file, self.delimiter, self.image_column, self.columns)
        table.require("image_column", self.image_column)
        for column in self.box_columns:
            table.require("box_columns", column)
        if self.label_column is not None:
            table.require("label_column", self.label_column)
        elif classes is not None and len(classes) != 1:
            raise DataError(f"{file}: label_column is null, so all boxes have one class, but there are {len(classes)} "
                            "classes; name the column of the classes")  # fmt: skip
        only = classes[0] if classes else "object"
        problems: list[Problem] = []
        sizes: dict[str, tuple[int, int] | None] = {}
        boxes: list[tuple[int, str, str, list[float]]] = []  # line, file, class, numbers
        images = table.column(self.image_column)
        cells = list(zip(*(table.column(column) for column in self.box_columns), strict=True))
        labels = [only] * len(images) if self.label_column is None else table.column(self.label_column)
        for name, values, label, line in zip(images, cells, labels, table.lines, strict=True):
            if not name:
                problems.append(Problem(str(file), f"line {line}: column '{self.image_column}' is empty; fill it"))
                continue
            name += self.image_suffix
            sizes.setdefault(name, None)
            if not any(values):
                continue
            try:
                numbers = _numbers(values, decimal_comma=self.delimiter != ",")
            except ValueError as error:
                problems.append(Problem(str(file), f"line {line}: {error}"))
                continue
            if label:
                boxes.append((line, name, label, numbers))
            else:
                problems.append(Problem(str(file), f"line {line}: column '{self.label_column}' is empty; fill it"))
        problems += table.too_long()
        if not boxes and not problems:
            raise DataError(f"{file}: contains no box; there is nothing to learn")
        if boxes and not self.fractions and all(max(map(abs, numbers)) <= 1 for *_, numbers in boxes):
            raise DataError(f"{file}: all numbers of the boxes lie within 0..1: set fractions: true")
        problems += check_listed_files(folder, list(sizes))
        for name in sizes:
            sizes[name] = image_size(os.path.join(folder, name))
        names = [label for _, _, label, _ in boxes]
        found = list(classes or ()) if self.label_column is None else sorted(set(names), key=sort_key(names))
        content: dict[str, list[Any]] = {
            "images": [_image(name, size) for name, size in sizes.items()],
            "categories": [{"id": k, "name": name} for k, name in enumerate(found or [only])],
            "annotations": [],
        }
        number_of = {category["name"]: category["id"] for category in content["categories"]}
        for line, name, label, numbers in boxes:
            size = sizes[name] if self.fractions else (1, 1)
            if size is None:  # the image is missing or broken, which is reported
                continue
            x1, y1, x2, y2 = _corners(self.boxes, numbers)
            if x2 <= x1 or y2 <= y1:
                shown = ", ".join(f"{value:g}" for value in numbers)
                reason = f"line {line}: box {shown} has no area as {self.boxes}; correct the line or 'boxes'"
                problems.append(Problem(str(file), reason))
                continue
            H, W = size
            content["annotations"].append(
                {
                    "id": f"line {line}",
                    "image_id": name,
                    "category_id": number_of[label],
                    "bbox": [x1 * W, y1 * H, (x2 - x1) * W, (y2 - y1) * H],
                }  # fmt: skip
            )
        source = CocoSource(format="coco", images=self.images, annotations=self.table)
        dataset = CocoDataset(source, root, classes, content)
        dataset.structural = [*problems, *dataset.structural]
        return dataset


def _image(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    height, width = size or (None, None)
    return {"id": name, "file_name": name, "height": height, "width": width}


def _numbers(values: Sequence[str], decimal_comma: bool) -> list[float]:
    """Return the four numbers of a box, "1.5" or, where commas do not separate columns, "1,5".

    Raises:
        ValueError: says what is wrong with the values.
    """
    words = re.split(r"[\s,;]+", values[0].strip(" []()")) if len(values) == 1 else list(values)
    try:
        numbers = [float(word.replace(",", ".") if decimal_comma else word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"box {', '.join(values)!r} must be four numbers; correct the line")
    return numbers


def _corners(kind: BoxFormat, numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 of the numbers of a box."""
    a, b, c, d = numbers
    if kind == "xyxy":
        return a, b, c, d
    return (a, b, a + c, b + d) if kind == "xywh" else (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
