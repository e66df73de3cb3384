"""Tables of images: csv files, files with columns apart by spaces, and files with one json object per line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allinone_ds.data.base import Problem
from allinone_ds.data.formats.common.class_names import match_classes
from allinone_ds.data.formats.common.listing import read_text
from allinone_ds.errors import DataError
from allinone_ds.strict import did_you_mean

JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one json object per line."""
MISSING = frozenset(("", "nan", "null", "none", "na", "n/a"))
"""Texts of a cell without a value, in lower case."""


class Table(NamedTuple):
    """A table as text.

    Example:
        >>> Table("a.csv", ["image", "smiling"], [["1.jpg", "1"]], [2]).column("smiling")
        ['1']
    """

    name: str
    """The file that messages name."""
    names: list[str]
    """Names of the columns."""
    rows: list[list[str]]
    """Cells of every row; a row may have fewer or more cells than there are columns."""
    lines: list[int]
    """Line of every row in the file."""
    unit: str = "line"
    """What messages call the numbers of `lines`."""

    def column(self, name: str) -> list[str]:
        """Return the cells of a column, "" where a row ends before it."""
        place = self.names.index(name)
        return [row[place].strip() if place < len(row) else "" for row in self.rows]

    def require(self, option: str, column: str) -> None:
        """Check that there is exactly one column of this name.

        Raises:
            DataError: names the option of the source.
        """
        count = self.names.count(column)
        if count > 1:
            raise DataError(f"{self.name}: {option} = '{column}', but {count} columns have this name; rename them")
        if not count:
            if not self.names:
                raise DataError(f"{self.name}: is empty; write the names of the columns, and a row per image below")
            other = next((mark for mark in ";\t|, " if mark in self.names[0]), None)
            if len(self.names) == 1 and other is not None:
                raise DataError(
                    f"{self.name}: its first line is one column, '{self.names[0]}'; set delimiter: {other!r}"
                )
            known = did_you_mean(column, self.names)
            raise DataError(f"{self.name}: {option} = '{column}', which is not a column; {known}")

    def too_long(self) -> list[Problem]:
        """Return a fault for each row with more values than there are columns."""
        count = len(self.names)
        return [
            Problem(
                self.name,
                f"line {line}: has {len(row)} values for {count} columns; quote values that contain the delimiter",
            )  # fmt: skip
            for row, line in zip(self.rows, self.lines, strict=True)
            if any(row[count:])
        ]


def read_table(file: Path, delimiter: str, first_column: str, columns: Sequence[str] | None = None) -> Table:
    """Read a table.

    Args:
        file: the file; with a suffix of `JSON_LINES`, it has one json object per line.
        delimiter: character between the columns; a space stands for any number of spaces. Such a file may begin with
            a line that only gives the number of rows, and its first column may lack a name, as in CelebA.
        first_column: name of the first column if it lacks one.
        columns: names of the columns of a csv file without a header; None: the first line has them.

    Raises:
        DataError: the file is missing, or a line is no csv or no json object.
    """
    text = read_text(file, file_names=True)
    if file.suffix.lower() in JSON_LINES:
        return _json_lines(file, text)
    if delimiter == " ":
        numbered = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if numbered and len(numbered[0][1]) == 1 and numbered[0][1][0].isdecimal():
            numbered = numbered[1:]
        names = list(numbered[0][1]) if numbered else []
        if len(numbered) > 1 and len(numbered[1][1]) == len(names) + 1:
            names = [first_column, *names]
        return Table(str(file), names, [row for _, row in numbered[1:]], [number for number, _ in numbered[1:]])
    if file.suffix.lower() == ".json":
        raise DataError(f"{file}: a table is a csv file, or a .jsonl file with one json object per line; write one")
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    names, rows, lines = list(columns or ()), [], []
    try:
        for row in reader:
            if not names:
                names = [name.strip() for name in row]
            elif row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}; write the file again as csv") from None
    return Table(str(file), names, rows, lines)


def attribute_values(
    table: Table, columns: Sequence[str], absent: int, hint: str = ""
) -> tuple[np.ndarray, list[Problem]]:
    """Return attributes as 1, 0 and NaN (no label), float64 (rows, A), and the faults of the rows.

    Args:
        table: the table.
        columns: names of A columns of 1, 0 and -1.
        absent: what stands for an attribute that an image does not have, 0 or -1; the other one is no label.
        hint: end of the message on values that are not allowed.
    """
    allowed = f"1 (present), {absent} (absent), {-1 - absent} and an empty cell (no label){hint}"
    words = {"true": "1", "false": str(absent)}
    table = table._replace(rows=[[words.get(cell.strip().lower(), cell) for cell in row] for row in table.rows])
    stored, problems = numbers(table, columns, lambda values: ~np.isin(values, (-1, 0, 1)), allowed)
    if absent == 0 and (stored == -1).any() and not (stored == 0).any():
        reason = (
            "holds -1 and 1 but no 0: if -1 stands for an absent attribute, as in CelebA, set 'absent: -1'; as it is, "
            "no image lacks an attribute"
        )
        problems.append(Problem(table.name, reason))
    values = np.full(stored.shape, np.nan)
    values[stored == 1] = 1
    values[stored == absent] = 0
    return values, problems


def regression_values(table: Table, columns: Sequence[str]) -> tuple[np.ndarray, list[Problem]]:
    """Return numbers, NaN for missing ones, float64 (rows, C), and the faults of the rows."""
    none_refused = lambda values: np.zeros(len(values), dtype=bool)  # noqa: E731
    return numbers(table, columns, none_refused, "a number, or an empty cell (no label)")


def in_train_order(
    name: str, columns: Sequence[str], values: np.ndarray, classes: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return columns in the order of the train set, with NaN for those that are missing, and their names.

    Args:
        name: the file that errors name.
        columns: names of C columns.
        values: (n, C).
        classes: names of the train set's columns; None keeps the own ones.

    Raises:
        DataError: the train set lacks a column.
    """
    label_of = match_classes(name, columns, classes)
    names = list(columns if classes is None else classes)
    ordered = np.full((len(values), len(names)), np.nan)
    for place, label in label_of.items():
        ordered[:, label] = values[:, place]
    return ordered, names


def _json_lines(file: Path, text: str) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: is not valid json ({error.msg}); write it again") from None
        if not isinstance(record, dict):
            raise DataError(f'{file}, line {number}: must be a json object, for example {{"image": "1.jpg"}}')
        records.append(record)
        lines.append(number)
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(str(file), names, [[_cell(record.get(name)) for name in names] for record in records], lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def read_partition(file: Path, part: str) -> set[str]:
    """Return the images of one part, from a file with an image and its part per line, apart by a comma or spaces.

    Raises:
        DataError: no line has this part.
    """
    pairs = [re.split(r"[,\s]+", line.strip()) for line in read_text(file, file_names=True).splitlines()]
    found = {pair[0] for pair in pairs if len(pair) == 2 and pair[1] == part}
    if not found:
        parts = ", ".join(sorted({pair[1] for pair in pairs if len(pair) == 2})[:10])
        raise DataError(f"{file}: no line has the part '{part}'; it has {parts or 'no line of an image and its part'}")
    return found


def numbers(
    table: Table, columns: Sequence[str], refuse: Callable[[np.ndarray], np.ndarray], allowed: str
) -> tuple[np.ndarray, list[Problem]]:
    """Return columns as numbers, NaN for missing values, and a fault for each row with a value that is not allowed.

    Args:
        table: the table.
        columns: names of C columns.
        refuse: returns which of an array's numbers are not allowed.
        allowed: what is allowed, for messages.

    Returns:
        float64 (rows, C), and the faults.
    """
    values = np.full((len(table.rows), len(columns)), np.nan)
    problems: dict[int, Problem] = {}
    for row, cells in enumerate(table.rows):
        if len(cells) != len(table.names):
            counts = f"{len(cells)} values for {len(table.names)} columns"
            problems[row] = Problem(table.name, f"{table.unit} {table.lines[row]}: has {counts}; correct the row")
    for place, name in enumerate(columns):
        texts = np.array(table.column(name), dtype=object)
        missing = np.array([text.lower() in MISSING for text in texts], dtype=bool)
        try:
            known = texts[~missing].astype(np.float64)
        except ValueError:
            known = np.array([_number(text) for text in texts[~missing]])
        wrong = np.zeros(len(texts), dtype=bool)
        wrong[~missing] = ~np.isfinite(known) | refuse(known)
        for row in np.flatnonzero(wrong).tolist():
            reason = f"{table.unit} {table.lines[row]}: column '{name}' is '{texts[row]}'; allowed are {allowed}"
            problems.setdefault(row, Problem(table.name, reason))
        values[~missing, place] = known
        values[wrong, place] = np.nan
    return values, [problems[row] for row in sorted(problems)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")  # refused like a number that is not finite
