"""Samples from Hugging Face `datasets`: a local folder or a name on the hub, with the columns that the config
names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torchvision import tv_tensors

from allinone_ds.data.base import (
    FRACTIONS,
    IGNORE,
    ClassNames,
    Problem,
    Sample,
    SampleDataset,
    SourceConfig,
    are_fractions,
    boxes_outside,
    match_classes,
    outside_reason,
    read_classes,
)
from allinone_ds.data.formats.label_maps import check_ids, check_size, class_ids, lone_class
from allinone_ds.data.images import read_image, read_label_map
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import Strict, did_you_mean


class Columns(Strict):
    """Which column holds what; the defaults are the names most datasets on the hub use."""

    image: str = "image"
    """The picture, in every kind."""
    label: str = "label"
    """Classification: the class, an integer, a ClassLabel or a name."""
    objects: str = "objects"
    """Detection: the annotations of one image."""
    bbox: str = "bbox"
    """Detection: the box, inside `objects`."""
    category: str = "category"
    """Detection: the class of the box, inside `objects`."""
    iscrowd: str = "iscrowd"
    """Detection: whether the box is a crowd, inside `objects`, where it has such a column."""
    label_map: str = "label"
    """Segmentation: the label map, a picture of class ids."""


class DatasetsSource(SourceConfig):
    """A dataset of the `datasets` library."""

    format: Literal["datasets"]
    path: str
    """A folder (written by `save_to_disk`, or of parquet files) below data_root, or a name on the hub."""
    name: str | None = None
    """The hub dataset's configuration, where it has several."""
    split: str = "train"
    kind: Literal["classification", "detection", "segmentation"]
    columns: Columns = Columns()
    classes: ClassNames | None = None
    """Class names by id, or a text file of them; without it those of the dataset's ClassLabel."""
    bbox_format: Literal["coco", "pascal"] = "coco"
    """coco: x, y, width, height; pascal: x1, y1, x2, y2. Pixels."""
    ignore_index: int = IGNORE
    """Segmentation: value of pixels without a class."""
    first_id: int = Field(0, ge=0)
    """Segmentation: id of the first class; 1 where 0 stands for pixels without one (with `ignore_index: 0`)."""


class HubDataset(SampleDataset):
    """One split of a `datasets` dataset; pictures are decoded as files are.

    Boxes and label maps are checked as each sample is read, since rows do not tell a picture's size.

    Args:
        table: the split, a `datasets.Dataset`.
        source: columns, kind and classes.
        root: what a relative `classes` file starts at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a column that is missing or of a wrong type, or without class names; in strict
            mode also for an empty split and class ids out of range.
    """

    def __init__(
        self,
        table: Any,
        source: DatasetsSource,
        root: Path,
        classes: list[str] | None = None,
        strict: bool = True,
    ):
        import datasets

        self.kind = source.kind
        self.source = source
        self.name = f"{source.path}[{source.split}]"
        self.structural: list[Problem] = []
        columns = source.columns
        second = {"classification": "label", "detection": "objects", "segmentation": "label_map"}[source.kind]
        for role in ("image", second):
            self._need(getattr(columns, role), table.features, f"columns.{role}")
        pictures = [columns.image] + ([columns.label_map] if source.kind == "segmentation" else [])
        for column in pictures:
            if not isinstance(table.features[column], datasets.Image):
                raise DataError(
                    f"{self.name}: column '{column}' is {table.features[column]}, it must be an Image; "
                    f"name another column, or cast it with cast_column('{column}', datasets.Image())"
                )
            table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table.select_columns(list(dict.fromkeys([*pictures, getattr(columns, second)])))
        stored = self._names(read_classes(source.classes, root))
        places = match_classes(self.name, stored, classes)
        self.classes = stored if classes is None else list(classes)
        self._place: dict[Any, int] = {**places, **{name: places[i] for i, name in enumerate(stored)}}
        self._lookup = np.array([places[i] for i in range(len(stored))], dtype=np.int64)
        if source.kind == "segmentation":
            check_ids(self.name, len(stored), source.first_id, source.ignore_index)
            self._lookup = self._lookup.astype(np.uint8)
        if source.kind == "classification":
            found = [(i, v) for i, v in enumerate(self.table[columns.label]) if v not in self._place]
            self.structural += [Problem(self.path(i), self._unknown(v)) for i, v in found]
        if source.kind == "segmentation":
            self.structural += lone_class(self, source.ignore_index)
        self.settle(strict)

    def __len__(self) -> int:
        return len(self.table)

    def path(self, index: int) -> str:
        return f"{self.name}#{index}"

    def __getitem__(self, index: int) -> Sample:
        columns = self.source.columns
        row = self.table[index]
        path = self.path(index)
        image = self._picture(row[columns.image], path)
        sample: Sample = {"image": image, "path": path, "index": index}
        if self.kind == "classification":
            if row[columns.label] not in self._place:
                raise BrokenSample(path, self._unknown(row[columns.label]))
            sample["label"] = self._place[row[columns.label]]
        elif self.kind == "detection":
            sample.update(self._objects(row[columns.objects], (image.shape[1], image.shape[2]), path))
        else:
            mask = self._labels(row[columns.label_map], path)
            check_size(mask, image, path)
            sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
        return sample

    def mask(self, index: int) -> np.ndarray:
        """Labels (H, W) of one sample, uint8, without its image.

        Raises:
            BrokenSample: the label map cannot be read, or holds what is no class.
        """
        column = self.source.columns.label_map
        return self._labels(self.table.select_columns(column)[index][column], self.path(index))

    def _labels(self, cell: Any, path: str) -> np.ndarray:
        source = self.source
        stored = read_label_map(path, _file_bytes(cell, path))
        return class_ids(stored, path, self._lookup, source.ignore_index, source.first_id)

    def _picture(self, cell: Any, path: str) -> tv_tensors.Image:
        return read_image(path, _file_bytes(cell, path))

    def _objects(self, cell: Any, size: tuple[int, int], path: str) -> dict[str, Any]:
        """Boxes, labels and crowd flags of one row; `cell` is a dict of lists or a list of dicts."""
        columns = self.source.columns
        if isinstance(cell, Mapping):
            rows, categories = cell[columns.bbox], cell[columns.category]
            crowd = cell.get(columns.iscrowd) or [0] * len(rows)
        else:
            rows, categories, crowd = (
                [o[columns.bbox] for o in cell or []],
                [o[columns.category] for o in cell or []],
                [o.get(columns.iscrowd) or 0 for o in cell or []],
            )
        if len(rows) != len(categories):
            raise BrokenSample(path, f"has {len(rows)} boxes and {len(categories)} categories; make them as many")
        for category in categories:
            if category not in self._place:
                raise BrokenSample(path, self._unknown(category))
        try:
            boxes = np.array(rows, dtype=np.float32).reshape(len(rows), 4)
        except (ValueError, TypeError):
            raise BrokenSample(path, f"column '{columns.bbox}' must hold four numbers a box") from None
        if self.source.bbox_format == "coco":
            boxes[:, 2:] += boxes[:, :2]
        if are_fractions(boxes):
            raise BrokenSample(path, FRACTIONS)
        turned = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)  # what coco's read as pascal's are
        wrong = boxes_outside(boxes, size) | turned | ~np.isfinite(boxes).all(axis=1)
        if wrong.any():
            reason = outside_reason(boxes[wrong][0], size)
            raise BrokenSample(path, f"{reason}, or set bbox_format (now {self.source.bbox_format})")
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        labels = np.array([self._place[c] for c in categories], dtype=np.int64).reshape(-1)[keep]
        return {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[keep]), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
            ),
            "labels": torch.from_numpy(labels),
            "iscrowd": torch.tensor([bool(c) for c in crowd], dtype=torch.bool)[torch.from_numpy(keep)],
        }

    def _names(self, given: list[str] | None) -> list[str]:
        """Class names by stored id: those given, those of the ClassLabel, or the names in a text column."""
        columns = self.source.columns
        feature: Any = None
        if self.kind == "classification":
            feature = self.table.features[columns.label]
        elif self.kind == "detection":
            inside = _inner(self.table.features[columns.objects])
            for role in ("bbox", "category"):
                self._need(getattr(columns, role), inside, f"columns.{role}")
            feature = _inner(inside[columns.category])
        names = given if given is not None else getattr(feature, "names", None)
        if names is None and self.kind == "classification" and getattr(feature, "dtype", "") == "string":
            names = sorted(set(self.table[columns.label]))
        if not names:
            raise DataError(f"{self.name}: its columns do not tell the class names; give 'classes' in the config")
        return list(names)

    def _need(self, column: str, found: Any, where: str) -> None:
        if not isinstance(found, Mapping) or column not in found:
            names = list(found) if isinstance(found, Mapping) else []
            raise DataError(
                f"{self.name}: {where} = '{column}', there is no such column; {did_you_mean(column, names)}"
            )

    def _unknown(self, found: Any) -> str:
        count = len(self._lookup)
        return f"class {found!r} is not one of the {count} classes; ids are 0..{count - 1}"


def open_datasets(
    source: DatasetsSource, root: Path, classes: list[str] | None = None, strict: bool = True
) -> HubDataset:
    """Loads a split from a folder below `root` when there is one, otherwise from the hub.

    Raises:
        DataError: neither can be loaded, there is no such split, or see `HubDataset`.
    """
    import datasets

    folder = root / source.path
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            table = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            path = str(folder) if folder.is_dir() else source.path
            table = datasets.load_dataset(path, source.name, split=source.split)
    except KeyError:
        raise DataError(f"{folder}: no split '{source.split}'; {did_you_mean(source.split, loaded)}") from None
    except Exception as error:  # network, missing names, broken files: the library raises many kinds
        raise DataError(
            f"{source.path}: cannot be loaded, neither as folder {folder} nor from the hub "
            f"({type(error).__name__}: {error}); correct 'path', 'name' or 'split'"
        ) from None
    return HubDataset(table, source, root, classes, strict)


def _inner(feature: Any) -> Any:
    """What a list feature holds, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _file_bytes(cell: Any, path: str) -> bytes:
    """The file's bytes of an undecoded picture cell."""
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise BrokenSample(path, "has no picture; remove the row")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise BrokenSample(path, f"{cell['path']}: cannot be opened: {error.strerror or error}") from None
