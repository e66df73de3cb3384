"""Classification from a csv file with a column of files, and a column of class names or a column per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from allinone_ds.data.base import Problem, SourceConfig, raise_problems
from allinone_ds.data.formats.common.class_names import match_classes, sort_key
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.listing import check_listed_files, require_folder
from allinone_ds.data.formats.common.tables import Table
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText


class ImageTableSource(SourceConfig):
    """A csv file with a header. The labels are class names as they are written, so ids may have gaps.

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
    images: PathText
    """Folder that the files in the table are relative to."""
    table: PathText
    """The csv file. Its first line names the columns."""
    image_column: str = "image"
    """Column of the files."""
    label_column: str = "label"
    """Column of the class names. Without `classes` of the task, the classes are numbered in the order of the names."""
    label_columns: list[str] | None = Field(None, min_length=2)
    """Instead of `label_column`: one column per class, with 1 in that of the image's class and 0 in the others. The
    columns name the classes."""
    image_suffix: str = ""
    """What is appended to the files, e.g. ".jpg" if the column holds names without a suffix."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between the columns."""

    @model_validator(mode="after")
    def _one_kind_of_label(self) -> ImageTableSource:
        if self.label_columns is not None and "label_column" in self.model_fields_set:
            raise ConfigError("'label_column' and 'label_columns' are both set; remove one of them")
        if self.label_columns is not None and len(set(self.label_columns)) < len(self.label_columns):
            raise ConfigError("label_columns names a column twice; name each once")
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        file = root / self.table
        folder = root / self.images
        require_folder(folder, "images")
        files, names, structural = self._read_rows(file)
        found = self.label_columns or sorted(set(names), key=sort_key(names))
        if not names:
            raise_problems(str(file), structural)
            raise DataError(f"{file}: contains no row with an image and a label; add rows below the header")
        label_of = match_classes(str(file), found, classes)
        label_of_name = {name: label_of[i] for i, name in enumerate(found)}
        labels = [label_of_name[name] for name in names]
        structural += check_listed_files(folder, files)
        return ClassifiedDataset(
            str(file), folder, files, labels, list(found if classes is None else classes), structural
        )

    def _read_rows(self, file: Path) -> tuple[list[str], list[str], list[Problem]]:
        """Return the files, their class names, and the faults of the rows."""
        table = Table(file, self.delimiter)
        table.require("image_column", self.image_column)
        for column in self.label_columns or [self.label_column]:
            table.require("label_columns" if self.label_columns else "label_column", column)
        files, names, problems = [], [], []
        for line, row in table.rows():
            image = row[self.image_column]
            try:
                label = _class_of(row, self.label_columns) if self.label_columns else row[self.label_column]
            except ValueError as error:
                problems.append(Problem(str(file), f"line {line}: {error}"))
                continue
            if not image or not label:
                empty = self.label_column if image else self.image_column
                problems.append(Problem(str(file), f"line {line}: column '{empty}' is empty; fill it"))
                continue
            files.append(image + self.image_suffix)
            names.append(label)
        return files, names, [*problems, *table.problems]


def _class_of(row: Mapping[str, str], columns: Sequence[str]) -> str:
    """Return the column of a row that holds 1.

    Raises:
        ValueError: it is not exactly one, or a value is neither 0 nor 1.
    """
    value_of = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
    wrong = [column for column in columns if row[column] not in value_of]
    if wrong:
        raise ValueError(f"column '{wrong[0]}' holds {row[wrong[0]]!r}, allowed are 0 and 1; correct it")
    chosen = [column for column in columns if value_of[row[column]]]
    if len(chosen) != 1:
        shown = ", ".join(chosen[:5]) or "none"
        raise ValueError(f"{len(chosen)} of the columns of classes hold 1 ({shown}); an image has exactly one class")
    return chosen[0]
