"""Classification from a csv file with a column of files and a column of class names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.common.class_names import match_classes
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.listing import check_listed_files, read_text, require_folder
from allinone_ds.errors import DataError
from allinone_ds.strict import PathText, did_you_mean


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
    image_suffix: str = ""
    """What is appended to the files, e.g. ".jpg" if the column holds names without a suffix."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Character between the columns."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        file = root / self.table
        folder = root / self.images
        require_folder(folder, "images")
        files, names, structural = self._read_rows(file)
        found = sorted(set(names), key=sort_key(names))
        if not found:
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
        reader = csv.DictReader(read_text(file, file_names=True).splitlines(), delimiter=self.delimiter)
        for field, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column not in (reader.fieldnames or ()):
                known = did_you_mean(column, reader.fieldnames or ())
                raise DataError(f"{file}: {field} = '{column}', which is not a column; {known}")
        files, names, problems = [], [], []
        for row in reader:
            image, label = ((row[column] or "").strip() for column in (self.image_column, self.label_column))
            if not image or not label:
                empty = self.label_column if image else self.image_column
                problems.append(Problem(str(file), f"line {reader.line_num}: column '{empty}' is empty; fill it"))
                continue
            files.append(image + self.image_suffix)
            names.append(label)
        return files, names, problems


def sort_key(names: Sequence[str]) -> type[int] | type[str]:
    """Return by what class names are sorted: as numbers if all of them are numbers.

    Example:
        >>> sorted(["10", "9"], key=sort_key(["10", "9"]))
        ['9', '10']
    """
    return int if all(name.isdecimal() for name in names) else str
