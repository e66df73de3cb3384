"""Samples from Hugging Face `datasets`: a local folder or a name on the hub, with the columns that the config names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, model_validator
from torchvision import tv_tensors

from allinone_ds.data.base import IGNORE, Problem, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.boxes import (
    FRACTIONS_REASON,
    are_fractions,
    boxes_outside,
    detection_fields,
    outside_reason,
)
from allinone_ds.data.formats.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.masks import (
    check_mask_size,
    check_numbering,
    ids_to_labels,
    single_class_warning,
    validate_class_ids,
)
from allinone_ds.data.images import read_image, read_label_map
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import Strict, did_you_mean


class Columns(Strict):
    """Names of the columns. The defaults are those of most datasets on the hub.

    Example:
        >>> Columns(image="img", label="fine_label").label
        'fine_label'
    """

    image: str = "image"
    """The image, in every kind."""
    label: str = "label"
    """Classification: the class, an integer, a ClassLabel or a name."""
    objects: str = "objects"
    """Detection: the annotations of one image."""
    bbox: str = "bbox"
    """Detection: the box, inside `objects`."""
    category: str = "category"
    """Detection: the class of the box, inside `objects`."""
    iscrowd: str = "iscrowd"
    """Detection: whether the box is a crowd, inside `objects`. The column is optional."""
    label_map: str = "label"
    """Segmentation: the label map, an image of class ids."""


class DatasetsSource(SourceConfig):
    """A dataset of the `datasets` library.

    Example:
        >>> source = DatasetsSource(format="datasets", path="org/name", kind="detection", columns={"image": "img"})
        >>> source.split, source.bbox_format
        ('train', 'coco')
    """

    format: Literal["datasets"]
    path: str
    """A folder below data_root (written by `save_to_disk`, or of parquet files), or a name on the hub."""
    name: str | None = None
    """Configuration of the dataset on the hub, if it has several."""
    split: str = "train"
    """Split of the dataset."""
    kind: Literal["classification", "detection", "segmentation"]
    """What the samples carry."""
    columns: Columns = Columns()
    """Names of the columns."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; null reads them from the columns."""
    bbox_format: Literal["coco", "pascal"] = "coco"
    """coco: x, y, width, height; pascal: x1, y1, x2, y2. In pixels."""
    ignore_index: int = IGNORE
    """Segmentation: value of the pixels without a class."""
    first_id: int = Field(0, ge=0)
    """Segmentation: id of the first class; 1 if 0 stands for pixels without a class (with `ignore_index: 0`)."""
    class_ids: list[NonNegativeInt] | None = None
    """Segmentation: id of each class where they do not count up, as in `label_maps`."""

    @model_validator(mode="after")
    def _one_numbering(self) -> DatasetsSource:
        check_numbering(self.class_ids, self.first_id)
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> HubDataset:
        import datasets

        folder = root / self.path
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(folder))
                table = loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                path = str(folder) if folder.is_dir() else self.path
                table = datasets.load_dataset(path, self.name, split=self.split)
        except KeyError:
            raise DataError(f"{folder}: no split '{self.split}'; {did_you_mean(self.split, loaded)}") from None
        except Exception as error:  # network, missing names, broken files: the library raises many types
            raise DataError(
                f"{self.path}: cannot be loaded, neither as folder {folder} nor from the hub "
                f"({type(error).__name__}: {error}); correct 'path', 'name' or 'split'"
            ) from None
        return HubDataset(table, self, root, classes)


_SECOND_COLUMN = {"classification": "label", "detection": "objects", "segmentation": "label_map"}


class HubDataset(SampleDataset):
    """One split of a `datasets` dataset, whose images are decoded like files.

    Boxes and label maps are checked when a sample is read, since the rows do not give the size of an image.

    Args:
        table: the split, a `datasets.Dataset`.
        source: columns, kind and classes.
        root: folder that a relative `classes` file starts at.
        classes: class names of the train set, whose order the labels follow; None for the order of the class ids.

    Raises:
        DataError: a column is missing or has a wrong type, or there are no class names. Class ids out of range are
            kept in `structural`.

    Example:
        >>> import datasets
        >>> label = datasets.ClassLabel(names=["cat", "dog"])
        >>> cell = {"bytes": b"P6 1 1 255 " + bytes(3), "path": None}
        >>> table = datasets.Dataset.from_dict(
        ...     {"image": [cell], "label": [1]}, features=datasets.Features({"image": datasets.Image(), "label": label})
        ... )
        >>> source = DatasetsSource(format="datasets", path="org/name", kind="classification")
        >>> sample = HubDataset(table, source, Path("."))[0]
        >>> sample["path"], sample["label"]
        ('org/name[train]#0', 1)
    """

    def __init__(self, table: Any, source: DatasetsSource, root: Path, classes: Sequence[str] | None = None):
        import datasets

        self.kind = source.kind
        self.source = source
        self.name = f"{source.path}[{source.split}]"
        self.structural: list[Problem] = []
        columns = source.columns
        second = _SECOND_COLUMN[source.kind]
        for role in ("image", second):
            self._require_column(getattr(columns, role), table.features, f"columns.{role}")
        images = [columns.image] + ([columns.label_map] if source.kind == "segmentation" else [])
        for column in images:
            if not isinstance(table.features[column], datasets.Image):
                raise DataError(
                    f"{self.name}: column '{column}' is {table.features[column]}, it must be an Image; "
                    f"name a different column, or cast it with cast_column('{column}', datasets.Image())"
                )
            table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table.select_columns(list(dict.fromkeys([*images, getattr(columns, second)])))
        stored = self._stored_names(read_classes(source.classes, root), classes)
        label_of = match_classes(self.name, stored, classes)
        self.classes = stored if classes is None else list(classes)
        # A cell holds either the id or the name of its class.
        self._label_of: dict[Any, int] = {**label_of, **{name: label_of[i] for i, name in enumerate(stored)}}
        self._labels = np.array([label_of[i] for i in range(len(stored))], dtype=np.int64)
        if source.kind == "segmentation":
            validate_class_ids(self.name, len(stored), source.first_id, source.ignore_index, source.class_ids)
            self._labels = self._labels.astype(np.uint8)
            self.structural += single_class_warning(self, source.ignore_index)
        if source.kind == "classification":
            cells = self.table[columns.label]
            self.labels = [self._label_of.get(v, -1) for v in cells]
            unknown = [(i, v) for i, v in enumerate(cells) if v not in self._label_of]
            self.structural += [Problem(self.path(i), self._unknown_class(v)) for i, v in unknown]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        columns = self.source.columns
        row = self.table[index]
        path = self.path(index)
        image = read_image(path, _file_bytes(row[columns.image], path))
        sample: Sample = {"image": image, "path": path, "index": index}
        if self.kind == "classification":
            if row[columns.label] not in self._label_of:
                raise BrokenSample(path, self._unknown_class(row[columns.label]))
            sample["label"] = self._label_of[row[columns.label]]
        elif self.kind == "detection":
            sample.update(self._objects(row[columns.objects], (image.shape[1], image.shape[2]), path))
        else:
            mask = self._decode_mask(row[columns.label_map], path)
            check_mask_size(mask, image, path)
            sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
        return sample

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one sample, uint8 (H, W), without reading its image.

        Raises:
            BrokenSample: the label map cannot be read, or contains a value that is not a class.
        """
        column = self.source.columns.label_map
        return self._decode_mask(self.table.select_columns(column)[index][column], self.path(index))

    def _decode_mask(self, cell: Any, path: str) -> np.ndarray:
        stored = read_label_map(path, _file_bytes(cell, path))
        source = self.source
        return ids_to_labels(stored, path, self._labels, source.ignore_index, source.first_id, source.class_ids)

    def _objects(self, cell: Any, size: tuple[int, int], path: str) -> Sample:
        """Return boxes, labels and crowd flags of one row; `cell` is a dict of lists or a list of dicts."""
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
            raise BrokenSample(path, f"has {len(rows)} boxes and {len(categories)} categories; give one per box")
        for category in categories:
            if category not in self._label_of:
                raise BrokenSample(path, self._unknown_class(category))
        try:
            boxes = np.array(rows, dtype=np.float32).reshape(len(rows), 4)
        except (ValueError, TypeError):
            raise BrokenSample(path, f"column '{columns.bbox}' must hold four numbers per box") from None
        if self.source.bbox_format == "coco":
            boxes[:, 2:] += boxes[:, :2]
        if are_fractions(boxes):
            raise BrokenSample(path, FRACTIONS_REASON)
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)  # coco boxes that are read as pascal
        invalid = boxes_outside(boxes, size) | inverted | ~np.isfinite(boxes).all(axis=1)
        if invalid.any():
            reason = outside_reason(boxes[invalid][0], size)
            raise BrokenSample(path, f"{reason}, or change bbox_format ({self.source.bbox_format})")
        labels = np.array([self._label_of[c] for c in categories], dtype=np.int64).reshape(-1)
        return detection_fields(boxes, labels, np.array(crowd, dtype=bool), size)

    def _stored_names(self, given: list[str] | None, train: Sequence[str] | None) -> list[str]:
        """Return the class names by stored id: given, of a ClassLabel, of a text column, or of the train set."""
        columns = self.source.columns
        feature: Any = None
        if self.kind == "classification":
            feature = self.table.features[columns.label]
        elif self.kind == "detection":
            inside = _element(self.table.features[columns.objects])
            for role in ("bbox", "category"):
                self._require_column(getattr(columns, role), inside, f"columns.{role}")
            feature = _element(inside[columns.category])
        names = given if given is not None else getattr(feature, "names", None)
        if names is None and self.kind == "classification" and getattr(feature, "dtype", "") == "string":
            names = sorted(set(self.table[columns.label]))
        names = train if names is None else names
        if not names:
            raise DataError(
                f"{self.name}: the columns contain no class names; set 'classes' of the source or of the task"
            )
        return list(names)

    def _require_column(self, column: str, features: Any, field: str) -> None:
        if not isinstance(features, Mapping) or column not in features:
            names = list(features) if isinstance(features, Mapping) else []
            raise DataError(f"{self.name}: {field} = '{column}', which is not a column; {did_you_mean(column, names)}")

    def _unknown_class(self, found: Any) -> str:
        count = len(self._labels)
        return f"class {found!r} is not one of the {count} classes; ids are 0..{count - 1}"


def _element(feature: Any) -> Any:
    """Return the element type of a list feature, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _file_bytes(cell: Any, path: str) -> bytes:
    """Return the encoded bytes in an undecoded image cell."""
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise BrokenSample(path, "has no image; remove the row")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise BrokenSample(path, f"{cell['path']}: cannot be opened: {error.strerror or error}") from None
