"""From a config's `format: ...` to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from allinone_ds.data.base import SampleDataset, raise_problems, unmet
from allinone_ds.data.formats.class_folders import ClassFoldersSource, open_class_folders
from allinone_ds.data.formats.coco import CocoDataset, CocoSource
from allinone_ds.data.formats.hugging_face import DatasetsSource, open_datasets
from allinone_ds.data.formats.image_list import ImageListSource, open_image_list
from allinone_ds.data.formats.label_maps import LabelMapsDataset, LabelMapsSource
from allinone_ds.strict import did_you_mean

FORMATS = ("coco", "label_maps", "image_list", "class_folders", "datasets")


def _known_format(value: Any) -> Any:
    """Refuses an unknown `format` with the nearest name before pydantic looks for its fields."""
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(value, dict) and found not in FORMATS:
        raise ValueError(f"format is {found!r}; {did_you_mean(str(found), FORMATS)}")
    return value


Source = Annotated[
    Annotated[
        CocoSource | LabelMapsSource | ImageListSource | ClassFoldersSource | DatasetsSource,
        Field(discriminator="format"),
    ],
    BeforeValidator(_known_format),
]
"""Where a task's samples come from; `format` says which of the source classes it is."""


def open_source(
    source: Source, root: Path | str, classes: list[str] | None = None, strict: bool = True
) -> SampleDataset:
    """Opens what a config describes.

    Args:
        source: one of the source classes.
        root: folder that relative paths start at (`data_root`).
        classes: class names of the train set. Give them for a test set: its classes then get the same places
            by name, even where it lacks some.
        strict: raise structural faults. False keeps them in the dataset's `structural` instead, for a full
            check.

    Raises:
        DataError: missing or empty data, less or more of it than `expect` says, and every other fault that shows
            without opening images.
    """
    dataset = _open(source, Path(root), classes)
    if source.expect is not None:
        dataset.structural += unmet(source.expect, dataset)
    if strict:
        raise_problems(dataset.name, dataset.structural)
    return dataset


def _open(source: Source, root: Path, classes: list[str] | None) -> SampleDataset:
    """The dataset with its faults kept in `structural`."""
    match source:
        case CocoSource():
            return CocoDataset(source, root, classes, strict=False)
        case LabelMapsSource():
            return LabelMapsDataset(source, root, classes, strict=False)
        case ImageListSource():
            return open_image_list(source, root, classes, strict=False)
        case ClassFoldersSource():
            return open_class_folders(source, root, classes, strict=False)
        case DatasetsSource():
            return open_datasets(source, root, classes, strict=False)
    raise TypeError(f"open_source takes a source of format {', '.join(FORMATS)}, not {type(source).__name__}")
