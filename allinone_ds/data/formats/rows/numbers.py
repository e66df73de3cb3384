"""Attributes and numbers in the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.data.formats.common.numbered_files import KEYS
from allinone_ds.data.formats.common.tables import Table, attribute_values, in_train_order, regression_values
from allinone_ds.data.formats.rows.columns import Columns, file_bytes
from allinone_ds.data.formats.rows.tar_table import TarTable
from allinone_ds.data.images import read_image
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import did_you_mean


class RowNumbers(SampleDataset):
    """Images with one number per class from a table, NaN where it is null.

    Args:
        table: a `datasets.Dataset`, or a table with its methods.
        kind: "attributes" or "regression".
        name: what messages call the table.
        columns: names of the columns.
        absent: attributes: what stands for an absent one, 0 or -1.
        classes: class names of the train set; None for a train set.

    Raises:
        DataError: a column is missing or has a wrong type.
    """

    in_memory = True

    def __init__(
        self, table: Any, kind: str, name: str, columns: Columns, absent: int, classes: Sequence[str] | None
    ) -> None:
        self.kind, self.name, self.column = kind, name, columns.image
        names = columns.values if kind == "regression" else columns.attributes
        if names is None:
            names = [n for n, f in table.features.items() if n != columns.image and _is_number(f)]
        for column in (columns.image, *names):
            if column not in table.features:
                field = "image" if column == columns.image else "values" if kind == "regression" else "attributes"
                hint = did_you_mean(column, table.features)
                raise DataError(f"{name}: columns.{field}: '{column}' is not a column; {hint}")
        if not names:
            raise DataError(
                f"{name}: has no column of numbers beside '{columns.image}'; name some in columns.attributes"
            )
        if not isinstance(table.features[columns.image], datasets.Image):
            raise DataError(f"{name}: column '{columns.image}' must be an Image; cast it, or name a different column")
        self.table = table.cast_column(columns.image, datasets.Image(decode=False)).select_columns([columns.image])
        stored = table.columns(names) if isinstance(table, TarTable) else {column: table[column] for column in names}
        cells = [[_text(value) for value in stored[column]] for column in names]
        rows = [list(row) for row in zip(*cells, strict=True)]
        texts = Table(name, list(names), rows, list(range(len(rows))), "row")
        values, problems = (
            attribute_values(texts, names, absent) if kind == "attributes" else regression_values(texts, names)
        )
        self.structural = problems
        self.values, self.classes = in_train_order(name, names, values, classes)

    def __len__(self) -> int:
        return len(self.table)

    def annotation(self, index: int) -> Sample:
        dtype = torch.float32 if self.kind == "attributes" else torch.float64
        return {KEYS[self.kind]: torch.from_numpy(self.values[index]).to(dtype)}

    def encoded(self, index: int) -> bytes | None:
        try:
            return file_bytes(self.table[index][self.column], self.path(index))
        except BrokenSample:
            return None

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path, file_bytes(self.table[index][self.column], path))
        return {"image": image, **self.annotation(index), "path": path, "index": index}


def _is_number(feature: Any) -> bool:
    return getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool"))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)
