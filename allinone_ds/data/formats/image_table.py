"""Classes, identities, attributes or numbers of images from a table: a csv file, or one json object per line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from allinone_ds.data.base import Problem, SampleDataset, SourceConfig, raise_problems
from allinone_ds.data.formats.common.class_names import match_classes, match_identities, sort_key
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.listing import check_listed_files, require_folder
from allinone_ds.data.formats.common.numbered_files import NumberedDataset
from allinone_ds.data.formats.common.tables import (
    Table,
    attribute_values,
    in_train_order,
    read_partition,
    read_table,
    regression_values,
)
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText


class ImageTableSource(SourceConfig):
    """A table with a header. Class names and identities are read as they are written, so ids may have gaps.

    Example:
        >>> import tempfile
        >>> source = ImageTableSource(format="image_table", images=".", table="a.csv", label_column="breed")
        >>> with tempfile.TemporaryDirectory() as root:
        ...     _ = Path(root, "a.csv").write_text("image,breed\\n1.jpg,pug\\n2.jpg,boxer\\n")
        ...     dataset = source.open(Path(root))
        >>> dataset.classes, dataset.labels, len(dataset.structural)  # no image exists
        (['boxer', 'pug'], [1, 0], 2)
    """

    format: Literal["image_table"]
    kind: Literal["classification", "retrieval", "attributes", "regression"] = "classification"
    """What the columns hold: a class, an identity, several attributes, or numbers."""
    images: PathText
    """Folder that the files in the table are relative to."""
    table: PathText
    """The file. Its first line names the columns; a .jsonl file has one json object per line instead."""
    image_column: str = "image"
    """Column of the files."""
    label_column: str = "label"
    """Classification and retrieval: column of the class names or identities. Without `classes` of the task, they are
    numbered in the order of the names."""
    label_columns: list[str] | None = Field(default=None, min_length=2)
    """Classification: instead of `label_column`, one column per class, with 1 in that of the image's class and 0 in the
    others. The columns name the classes."""
    columns: list[str] | None = Field(default=None, min_length=1)
    """Attributes: their columns, null is all but `image_column`. Regression: the columns of the numbers, null is the
    column `value`."""
    absent: Literal[0, -1] = 0
    """Attributes: the value of an attribute that an image does not have; 1 stands for one that it has. The third of 1,
    0 and -1 stands for no label, as an empty cell does."""
    partition: PathText | None = None
    """A file with an image and its part per line, of which only the images of `part` are used."""
    part: str | int | None = None
    """The part in `partition`."""
    image_suffix: str = ""
    """What is appended to the files, e.g. ".jpg" if the column holds names without a suffix."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between the columns; a space stands for any number of spaces."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> ImageTableSource:
        """Refuse options of other kinds, which would change nothing."""
        kinds = {
            "label_column": ("classification", "retrieval"),
            "label_columns": ("classification",),
            "columns": ("attributes", "regression"),
            "absent": ("attributes",),
        }
        for option, of in kinds.items():
            if self.kind not in of and getattr(self, option) != type(self).model_fields[option].default:
                raise ConfigError(f"{option} is an option of kind {' and '.join(of)}, the kind is {self.kind}; "
                                  "remove it, or correct 'kind'")  # fmt: skip
        if (self.partition is None) != (self.part is None):
            raise ConfigError("'partition' and 'part' belong together: a file, and the part of it that is used")
        for option in ("columns", "label_columns"):
            named = getattr(self, option) or ()
            if len(set(named)) < len(named):
                raise ConfigError(f"{option} names a column twice; name each once")
        if self.label_columns is not None and self.label_column != type(self).model_fields["label_column"].default:
            raise ConfigError("'label_column' and 'label_columns' are both set; remove one of them")
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        require_folder(root / self.images, "images")
        table = read_table(root / self.table, self.delimiter, self.image_column)
        table.require("image_column", self.image_column)
        if len(set(table.names)) < len(table.names):
            twice = next(name for name in table.names if table.names.count(name) > 1)
            raise DataError(f"{table.name}: column '{twice}' stands twice in the header; rename one")
        if self.partition is not None:
            table = self._part(table, read_partition(root / self.partition, str(self.part)))
        if self.kind in ("classification", "retrieval"):
            return self._labelled(root, table, classes)
        return self._numbered(root, table, classes)

    def _labelled(self, root: Path, table: Table, classes: Sequence[str] | None) -> ClassifiedDataset:
        for column in self.label_columns or [self.label_column]:
            table.require("label_columns" if self.label_columns else "label_column", column)
        files, names, structural = self._labelled_rows(table)
        found = self.label_columns or sorted(set(names), key=sort_key(names))
        if not names:
            raise_problems(table.name, structural)
            raise DataError(f"{table.name}: contains no row with an image and a label; add rows below the header")
        if self.kind == "retrieval":
            all_classes = match_identities(table.name, found, classes)
            place = {name: label for label, name in enumerate(all_classes)}
        else:
            label_of = match_classes(table.name, found, classes)
            place = {name: label_of[i] for i, name in enumerate(found)}
            all_classes = list(found if classes is None else classes)
        structural += check_listed_files(root / self.images, files, names)
        labels = [place[name] for name in names]
        return ClassifiedDataset(table.name, root / self.images, files, labels, all_classes, structural, kind=self.kind)

    def _labelled_rows(self, table: Table) -> tuple[list[str], list[str], list[Problem]]:
        """Return the files, their class names, and the faults of the rows."""
        files, names, problems = [], [], []
        if self.label_columns is None:
            labels: Sequence[str | Problem] = table.column(self.label_column)
        else:
            labels = _one_hot(table, self.label_columns)
        for image, label, line in zip(table.column(self.image_column), labels, table.lines, strict=True):
            if isinstance(label, Problem):
                problems.append(label)
                continue
            if not image or not label:
                empty = self.label_column if image else self.image_column
                problems.append(Problem(table.name, f"line {line}: column '{empty}' is empty; fill it"))
                continue
            files.append(image + self.image_suffix)
            names.append(label)
        return files, names, [*problems, *table.too_long()]

    def _numbered(self, root: Path, table: Table, classes: Sequence[str] | None) -> NumberedDataset:
        columns = self._number_columns(table)
        if self.kind == "attributes":
            hint = "; name the attributes in 'columns' if this is none" if self.columns is None else ""
            values, structural = attribute_values(table, columns, self.absent, hint)
        else:
            values, structural = regression_values(table, columns)
        images = table.column(self.image_column)
        for row in [row for row, image in enumerate(images) if not image]:
            reason = f"line {table.lines[row]}: column '{self.image_column}' is empty; fill it"
            structural.append(Problem(table.name, reason))
        used = [row for row, image in enumerate(images) if image]
        if not used:
            raise DataError(f"{table.name}: contains no row with an image; add rows below the header")
        files = [images[row] + self.image_suffix for row in used]
        rows = [", ".join(f"{number:g}" for number in row) for row in values[used]]
        structural += check_listed_files(root / self.images, files, rows)
        ordered, names = in_train_order(table.name, columns, values[used], classes)
        return NumberedDataset(self.kind, table.name, root / self.images, files, ordered, names, structural)

    def _number_columns(self, table: Table) -> list[str]:
        """Return the columns of the attributes or numbers."""
        if self.columns is None and self.kind == "attributes":
            columns = [name for name in table.names if name != self.image_column]
            if not columns:
                raise DataError(f"{table.name}: has no column beside '{self.image_column}'; add one per attribute")
            return columns
        columns = self.columns or ["value"]
        for column in columns:
            table.require("columns", column)
        return list(columns)

    def _part(self, table: Table, used: set[str]) -> Table:
        images = table.column(self.image_column)
        rows = [row for row, image in enumerate(images) if image in used or image + self.image_suffix in used]
        if not rows:
            raise DataError(f"{table.name}: no image of part '{self.part}' is in the table; correct 'partition'")
        return table._replace(rows=[table.rows[row] for row in rows], lines=[table.lines[row] for row in rows])


def _one_hot(table: Table, columns: Sequence[str]) -> list[str | Problem]:
    """Return for each row the column that holds 1, or what is wrong with the row."""
    found: list[str | Problem] = []
    for line, cells in zip(table.lines, zip(*map(table.column, columns), strict=True), strict=True):
        chosen = [column for column, cell in zip(columns, cells, strict=True) if cell in ("1", "1.0")]
        wrong = [(column, cell) for column, cell in zip(columns, cells, strict=True) if cell not in _ZERO_ONE]
        if wrong:
            reason = f"column '{wrong[0][0]}' holds {wrong[0][1]!r}, allowed are 0 and 1; correct it"
            found.append(Problem(table.name, f"line {line}: {reason}"))
        elif len(chosen) != 1:
            shown = ", ".join(chosen[:5]) or "none"
            reason = f"{len(chosen)} of the columns of classes hold 1 ({shown}); an image has exactly one class"
            found.append(Problem(table.name, f"line {line}: {reason}"))
        else:
            found.append(chosen[0])
    return found


_ZERO_ONE = ("0", "0.0", "1", "1.0")
