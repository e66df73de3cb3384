"""Rows of csv files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from allinone_ds.data.base import Problem
from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.errors import DataError
from allinone_ds.strict import did_you_mean


class Table:
    """A csv file, whose first line names the columns.

    Args:
        file: the file.
        delimiter: character between the columns.
        columns: names of the columns of a file without a header; None: the first line has them.

    Raises:
        DataError: the file is missing or is no csv.

    Attributes:
        columns: names of the columns.
        problems: faults of the rows that `rows` has passed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("image,breed\\n1.jpg,pug\\n")
        ...     table = Table(Path(folder, "a.csv"))
        >>> table.columns, list(table.rows())
        (['image', 'breed'], [(2, {'image': '1.jpg', 'breed': 'pug'})])
    """

    def __init__(self, file: Path, delimiter: str = ",", columns: Sequence[str] | None = None) -> None:
        self.file = file
        self.problems: list[Problem] = []
        lines = read_text(file, file_names=True).splitlines()
        self._reader = csv.DictReader(lines, fieldnames=columns, delimiter=delimiter)
        try:
            self.columns = list(self._reader.fieldnames or ())
        except csv.Error as error:
            raise DataError(f"{file}: line 1: {error}; write the file again as csv") from None

    def require(self, field: str, column: str) -> None:
        """Raise a `DataError` that names the config's `field` if the table does not have such a column once."""
        count = self.columns.count(column)
        if count > 1:
            raise DataError(f"{self.file}: {field} = '{column}', but {count} columns have this name; rename them")
        if not count:
            known = did_you_mean(column, self.columns)
            raise DataError(f"{self.file}: {field} = '{column}', which is not a column; {known}")

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield the number of the line and the values without spaces around them; a missing value is "".

        A row with more values than columns is left out and added to `problems`.

        Raises:
            DataError: a line is not csv.
        """
        try:
            for row in self._reader:
                further = row.pop(None, None)  # type: ignore[call-overload]
                if further and any(further):
                    count = len(self.columns) + len(further)
                    reason = f"line {self._reader.line_num}: has {count} values for {len(self.columns)} columns"
                    self.problems.append(Problem(str(self.file), f"{reason}; quote values that contain the delimiter"))
                    continue
                yield self._reader.line_num, {name: (value or "").strip() for name, value in row.items()}
        except csv.Error as error:
            line = self._reader.line_num + 1
            raise DataError(f"{self.file}: line {line}: {error}; write the file again as csv") from None
