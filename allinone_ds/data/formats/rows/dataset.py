"""Samples from the rows of a table, with the columns that the config names."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import corner
from allinone_ds.data.base import Problem, Sample, SampleDataset
from allinone_ds.data.formats.common.boxes import (
    FRACTIONS_REASON,
    are_fractions,
    boxes_outside,
    detection_fields,
    outside_reason,
)
from allinone_ds.data.formats.common.class_names import match_classes, match_identities, read_classes
from allinone_ds.data.formats.common.masks import check_mask_size
from allinone_ds.data.formats.common.object_parts import OBJECT_KINDS, PointNames, checked_keypoints, mask_fields
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.formats.maps.dense_maps import no_classes
from allinone_ds.data.formats.maps.values import DENSE_KINDS, as_target, read_values
from allinone_ds.data.formats.rows.columns import (
    COLUMNS,
    element_of,
    file_bytes,
    of_objects,
    stored_map,
)
from allinone_ds.data.formats.rows.numbers import RowNumbers
from allinone_ds.data.formats.rows.source import RowsSource
from allinone_ds.data.formats.rows.tar_table import TarTable
from allinone_ds.data.images import image_size, read_image
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.strict import did_you_mean


def open_rows(table: Any, source: RowsSource, name: str, root: Path, classes: Sequence[str] | None) -> SampleDataset:
    """Return the dataset of a table.

    Args:
        table: a `datasets.Dataset`, or a table with its methods.
        source: columns, kind and classes.
        name: what messages call the table.
        root: folder that a relative `classes` file starts at.
        classes: class names of the train set; None for a train set.

    Raises:
        DataError: a column is missing or has a wrong type, or there are no class names.
    """
    if source.kind in ("attributes", "regression"):
        names = classes if classes is not None else read_classes(source.classes, root)
        return RowNumbers(table, source.kind, name, source.columns, source.absent, names)
    return RowsDataset(table, source, name, root, classes)


class RowsDataset(SampleDataset):
    """The samples of a table, whose images are decoded like files.

    Boxes and label maps are checked when a sample is read, since the rows do not give the size of an image.

    Args:
        table: a `datasets.Dataset`, or a table with its methods.
        source: columns, kind and classes.
        name: what messages call the table.
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
        >>> source = RowsSource(format="datasets", kind="classification")
        >>> sample = RowsDataset(table, source, "org/name", Path("."))[0]
        >>> sample["path"], sample["label"]
        ('org/name#0', 1)
    """

    def __init__(self, table: Any, source: RowsSource, name: str, root: Path, classes: Sequence[str] | None = None):
        import datasets

        self.kind = source.kind
        self.source = source
        self.name = name
        self.structural: list[Problem] = []
        columns = source.columns
        second = COLUMNS[source.kind][1]
        for role in ("image", second):
            self._require_column(getattr(columns, role), table.features, f"columns.{role}")
        images = [columns.image] + ([columns.label_map] if source.kind == "segmentation" else [])
        if source.kind in DENSE_KINDS and isinstance(table.features[columns.map], datasets.Image):
            images.append(columns.map)
        for column in images:
            if not isinstance(table.features[column], datasets.Image):
                raise DataError(
                    f"{self.name}: column '{column}' is {table.features[column]}, it must be an Image; "
                    f"name a different column, or cast it with cast_column('{column}', datasets.Image())"
                )
            table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table.select_columns(list(dict.fromkeys([*images, getattr(columns, second)])))
        if source.kind in DENSE_KINDS:
            self.classes = no_classes(self.name, source.kind, read_classes(source.classes, root) or classes)
            return
        stored = self._stored_names(read_classes(source.classes, root), classes)
        if source.kind == "retrieval":
            classes = match_identities(self.name, stored, classes)
        label_of = match_classes(self.name, stored, classes)
        self.classes = stored if classes is None else list(classes)
        # A cell holds either the id or the name of its class.
        by_id = {source.first_id + i: label for i, label in label_of.items()}
        self._label_of: dict[Any, int] = {**by_id, **{name: label_of[i] for i, name in enumerate(stored)}}
        self._labels = np.array([label_of[i] for i in range(len(stored))], dtype=np.int64)
        if source.kind == "segmentation":
            source.fit_classes(self.name, len(stored))
            self._labels = self._labels.astype(np.uint8)
            self.structural += source.single_class(self)
        if source.kind == "keypoints":
            self._points = PointNames(self.name, [None] * len(self.classes), source.flip_pairs)
        if source.kind in ("classification", "retrieval"):
            self.in_memory = True
            cells = self.table[columns.label]
            labels = [self._label_of[v] if self._is_class(v) else -1 for v in cells]
            unknown = [i for i, label in enumerate(labels) if label < 0]
            self.structural += [Problem(self.path(i), self._unknown_class(cells[i])) for i in unknown]
            self.labels = labels

    def __len__(self) -> int:
        return len(self.table)

    def path(self, index: int) -> str:
        return self.table.path(index) if isinstance(self.table, TarTable) else super().path(index)

    def __getitem__(self, index: int) -> Sample:
        columns = self.source.columns
        row = self.table[index]
        path = self.path(index)
        image = read_image(path, file_bytes(row[columns.image], path))
        sample: Sample = {"image": image, "path": path, "index": index}
        if self.kind in ("classification", "retrieval"):
            if not self._is_class(row[columns.label]):
                raise BrokenSample(path, self._unknown_class(row[columns.label]))
            sample["label"] = self._label_of[row[columns.label]]
        elif self.kind in OBJECT_KINDS:
            size = (image.shape[1], image.shape[2])
            found = self._objects(row[columns.objects], size, path)
            more = self._parts(row[columns.objects], found, size, path)
            sample.update(detection_fields(*found, size, more))
            if self.kind == "keypoints":
                sample["corner"] = corner(size)
        elif self.kind in DENSE_KINDS:
            values = self._values(row[columns.map], path)
            check_mask_size(values, image, path, "map")
            sample[self.kind] = as_target(values, self.kind)
        else:
            mask = self._decode_mask(row[columns.label_map], path)
            check_mask_size(mask, image, path)
            sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
        return sample

    def encoded(self, index: int) -> bytes | None:
        column = self.source.columns.image
        try:
            return file_bytes(self.table.select_columns(column)[index][column], self.path(index))
        except BrokenSample:
            return None

    def annotation(self, index: int) -> Sample:
        if self.labels is not None and self.labels[index] >= 0:
            return {"label": self.labels[index]}
        if self.kind == "segmentation":
            return {"mask": self.mask(index)}
        columns = self.source.columns
        if self.kind in DENSE_KINDS:
            cell = self.table.select_columns(columns.map)[index][columns.map]
            return {self.kind: self._values(cell, self.path(index))}
        row = self.table[index]
        path = self.path(index)
        size = image_size(io.BytesIO(file_bytes(row[columns.image], path)))
        if self.kind not in OBJECT_KINDS or size is None:
            return super().annotation(index)
        boxes, labels, crowd = found = self._objects(row[columns.objects], size, path)
        more = {} if self.kind != "keypoints" else self._parts(row[columns.objects], found, size, path)
        return {"boxes": boxes, "labels": labels, "iscrowd": crowd, "size": size, **more}

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one sample, uint8 (H, W), without reading its image.

        Raises:
            BrokenSample: the label map cannot be read, or contains a value that is not a class.
        """
        column = self.source.columns.label_map
        return self._decode_mask(self.table.select_columns(column)[index][column], self.path(index))

    def _values(self, cell: Any, path: str) -> np.ndarray:
        return read_values(stored_map(cell, path), self.kind, self.source, path)

    def _decode_mask(self, cell: Any, path: str) -> np.ndarray:
        return self.source.read_mask(path, self._labels, file_bytes(cell, path))

    def _objects(self, cell: Any, size: tuple[int, int], path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return boxes (n, 4), labels (n,) and crowd flags (n,) of one row, a dict of lists or a list of dicts."""
        columns = self.source.columns
        rows, categories, crowd = (of_objects(cell, c) for c in (columns.bbox, columns.category, columns.iscrowd))
        crowd = crowd or [0] * len(rows)
        if not len(rows) == len(categories) == len(crowd):
            raise BrokenSample(
                path,
                f"has {len(rows)} boxes, {len(categories)} categories and {len(crowd)} values of "
                f"'{columns.iscrowd}'; give one per box",
            )
        for category in categories:
            if not self._is_class(category):
                raise BrokenSample(path, self._unknown_class(category))
        try:
            boxes = np.array(rows, dtype=np.float32).reshape(len(rows), 4)
        except (ValueError, TypeError):
            wrong = next((row for row in rows if not isinstance(row, list) or len(row) != 4 or None in row), rows)
            reason = f"column '{columns.bbox}' must hold four numbers per box, found {wrong!r}; correct or remove it"
            raise BrokenSample(path, reason) from None
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
        flags = np.array([flag in (1, "1") for flag in crowd], dtype=bool)  # bool("0") would be True
        return boxes, labels, flags

    def _parts(self, cell: Any, found: tuple[np.ndarray, ...], size: tuple[int, int], path: str) -> Sample:
        """Return the masks, or the keypoints and areas, of the objects of one row."""
        columns = self.source.columns
        if self.kind == "instances":
            return mask_fields(of_objects(cell, columns.segmentation), len(found[0]), size, path)
        if self.kind == "keypoints":
            points, areas = of_objects(cell, columns.keypoints), of_objects(cell, columns.area)
            return checked_keypoints(points, areas, found, self._points, size, path)
        return {}

    def _stored_names(self, given: list[str] | None, train: Sequence[str] | None) -> list[str]:
        """Return the class names by stored id: given, of a ClassLabel, of a text column, or of the train set."""
        columns = self.source.columns
        feature: Any = None
        labelled = self.kind in ("classification", "retrieval")
        if labelled:
            feature = self.table.features[columns.label]
        elif self.kind in OBJECT_KINDS:
            inside = element_of(self.table.features[columns.objects])
            part = {"instances": ["segmentation"], "keypoints": ["keypoints"]}.get(self.kind, [])
            for role in ("bbox", "category", *part):
                self._require_column(getattr(columns, role), inside, f"columns.{role}")
            feature = element_of(inside[columns.category])
        if feature is not None and element_of(feature) is not feature or isinstance(feature, Mapping):
            column = columns.label if labelled else columns.category
            raise DataError(f"{self.name}: column '{column}' is {feature}; it must hold one class, a number or a name")
        own = getattr(feature, "names", None)
        text = getattr(feature, "dtype", "") in ("string", "large_string")
        if self.source.first_id and (own is not None or text) and self.kind != "segmentation":
            found = "a ClassLabel, whose ids start at 0" if own is not None else "text"
            raise DataError(f"{self.name}: first_id = {self.source.first_id}: the column is {found}; remove first_id")
        names = given if given is not None else own
        if names is None and (self.kind == "retrieval" or (labelled and text)):
            names = sorted({name for name in self.table[columns.label] if name is not None})
        names = train if names is None else names
        if not names:
            raise DataError(
                f"{self.name}: the columns contain no class names; set 'classes' of the source or of the task"
            )
        return list(Texts(names))  # new objects: each cell of a table would keep a megabyte of it in memory

    def _require_column(self, column: str, features: Any, field: str) -> None:
        if not isinstance(features, Mapping) or column not in features:
            names = list(features) if isinstance(features, Mapping) else []
            raise DataError(f"{self.name}: {field} = '{column}', which is not a column; {did_you_mean(column, names)}")

    def _is_class(self, value: Any) -> bool:
        return isinstance(value, int | float | str) and value in self._label_of

    def _unknown_class(self, found: Any) -> str:
        if found is None:
            return "has no class (null); set it or remove the row"
        first, count = self.source.first_id, len(self._labels)
        return (
            f"class {found!r} is not one of the {count} classes; ids are {first}..{first + count - 1} "
            f"(they count from first_id, which is {first})"
        )
