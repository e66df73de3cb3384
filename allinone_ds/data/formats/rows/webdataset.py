"""Samples from tar files of the webdataset format, read at any position."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.formats.rows.columns import COLUMNS
from allinone_ds.data.formats.rows.dataset import open_rows
from allinone_ds.data.formats.rows.source import RowsSource
from allinone_ds.data.formats.rows.tar_table import IMAGE, TarTable
from allinone_ds.errors import DataError
from allinone_ds.strict import PathText


class WebDatasetSource(RowsSource):
    """Tar files of the webdataset format. A column is the ending of a member, or a key of its `.json`.

    Example:
        >>> import io, json, tarfile, tempfile
        >>> from pathlib import Path
        >>> members = {"a.ppm": b"P6 1 1 255 " + bytes(3), "a.json": b'{"label": 1}'}
        >>> source = WebDatasetSource(
        ...     format="webdataset", shards="train-{0..0}.tar", kind="classification", classes=["cat", "dog"],
        ...     columns={"label": "label"},
        ... )
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with tarfile.open(Path(root, "train-0.tar"), "w") as archive:
        ...         for name, content in members.items():
        ...             member = tarfile.TarInfo(name)
        ...             member.size = len(content)
        ...             archive.addfile(member, io.BytesIO(content))
        ...     source.open(Path(root))[0]["label"]
        1
    """

    format: Literal["webdataset"]
    shards: PathText | list[PathText] = Field(min_length=1)
    """The tar files, not compressed: names with * for anything and {0000..0099} for a range of numbers."""

    @model_validator(mode="before")
    @classmethod
    def _columns_of_the_format(cls, content: Any) -> Any:
        """Name the columns as the webdataset format does, where the run's file does not."""
        columns = content.get("columns", {}) if isinstance(content, dict) else None
        if not isinstance(columns, dict):
            return content
        return {**content, "columns": {**_USUAL.get(content.get("kind"), {}), **columns}}

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        shards = [shard for pattern in patterns for shard in find_shards(root, pattern)]
        for shard, count in Counter(shards).items():
            if count > 1:
                raise DataError(f"shards: {shard} is named {count} times, so its samples would be; name it once")
        table = TarTable(shards)
        target = getattr(self.columns, COLUMNS[self.kind][1], None)
        if self.columns.image == IMAGE and (wrong := table.only_image(str(target))) is not None:
            raise DataError(
                f"{wrong}: '{target}' is its only image, so it would be image and target; set columns.image and "
                f"columns.{COLUMNS[self.kind][1]}"
            )
        return open_rows(table, self, ", ".join(patterns), root, classes)


_USUAL = {
    "classification": {"label": "cls"}, "retrieval": {"label": "cls"}, "segmentation": {"label_map": "png"},
}  # fmt: skip
"""Kind -> names of its columns in the webdataset format, where they are not the names of `Columns`."""


def find_shards(root: Path, pattern: str) -> list[Path]:
    """Return the tar files that a pattern stands for, in the order of their names or numbers.

    Args:
        root: folder that a relative pattern starts at.
        pattern: a path, with * for anything and {0000..0099} for a range of numbers.

    Raises:
        DataError: it stands for no file, or a file of a range is missing.
    """
    names = [pattern]
    while match := next((found for name in names if (found := _RANGE.search(name))), None):
        first, last = match.groups()
        if int(first) > int(last):
            raise DataError(f"shards = {pattern}: the range {match.group()} is empty; give the smaller number first")
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names = [name.replace(match.group(), number, 1) for name in names for number in numbers]
    shards: list[Path] = []
    for name in names:
        path = root / name
        files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] if path.is_file() else []
        if not files:
            raise DataError(f"shards = {pattern}: there is no {path}; correct the path, or copy the file")
        shards += files
    return shards


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
