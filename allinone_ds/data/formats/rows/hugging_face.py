"""Samples from Hugging Face `datasets`: a local folder or a name on the hub, with the columns that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.formats.rows.dataset import open_rows
from allinone_ds.data.formats.rows.source import RowsSource
from allinone_ds.errors import DataError
from allinone_ds.strict import PathText, did_you_mean


class DatasetsSource(RowsSource):
    """A dataset of the `datasets` library.

    Example:
        >>> source = DatasetsSource(format="datasets", path="org/name", kind="detection", columns={"image": "img"})
        >>> source.columns.image, source.bbox_format
        ('img', 'coco')
    """

    format: Literal["datasets"]
    path: PathText
    """A folder below data_root (written by `save_to_disk`, or of parquet files), or a name on the hub."""
    name: str | None = None
    """Configuration of the dataset on the hub, if it has several."""
    split: str | None = None
    """Split of the dataset, or a part of one such as "train[:80%]"; null is "train", or all of a dataset that was saved
    without splits."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        import datasets

        folder = root / self.path
        try:
            saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
            if saved:
                loaded = datasets.load_from_disk(str(folder))
            else:
                path = str(folder) if folder.is_dir() else self.path
                table = datasets.load_dataset(path, self.name, split=self.split or "train")
        except Exception as error:  # network, missing names, broken files: the library raises many types
            raise DataError(
                f"{self.path}: cannot be loaded, neither as folder {folder} nor from the hub "
                f"({type(error).__name__}: {error}); correct 'path', 'name' or 'split'"
            ) from None
        if saved:
            if self.name is not None:
                raise DataError(f"{folder}: 'name' selects a configuration on the hub, this is a folder; remove it")
            table = saved_split(loaded, self.split, folder)
        return open_rows(table, self, f"{self.path}[{self.split or table.split or 'train'}]", root, classes)


def saved_split(loaded: Any, split: str | None, folder: Path) -> Any:
    """Return the rows of a split in what `save_to_disk` wrote: several splits, or one dataset that may have a name.

    Args:
        loaded: what the folder holds.
        split: name of a split or a part of one; None: all of one dataset, or "train".
        folder: the folder, for errors.

    Raises:
        DataError: there is no such split.
    """
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        splits, default = dict(loaded), "train"
    else:
        default = str(loaded.split or "train")
        splits = {default: loaded}
    split = split or default
    try:
        sizes = {name: len(table) for name, table in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, ValueError):
        several = isinstance(loaded, datasets.DatasetDict)
        raise DataError(
            f"{folder}: no split '{split}'; {did_you_mean(split, splits)}, or a part of one, such as "
            f"'{default}[:80%]'{'' if several else '; the folder holds one dataset, not several splits'}"
        ) from None
    tables = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
