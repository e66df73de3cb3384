"""Boxes, keypoints or masks of objects from a COCO json and a folder of images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torchvision import tv_tensors

from allinone_ds.data.augmentation.objects import corner
from allinone_ds.data.base import Problem, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.boxes import (
    FRACTIONS_REASON,
    POINT_FRACTIONS_REASON,
    are_fractions,
    boxes_outside,
    detection_fields,
    outside_reason,
)
from allinone_ds.data.formats.common.class_names import match_classes
from allinone_ds.data.formats.common.listing import check_listed_files, read_text, require_folder
from allinone_ds.data.formats.common.object_parts import (
    PointNames,
    apart,
    decode_mask,
    keypoint_fault,
    keypoint_fields,
    points_outside,
    segmentation_fault,
    split_points,
)
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import image_size, read_image
from allinone_ds.errors import BrokenSample, ConfigError, DataError
from allinone_ds.strict import PathText


class CocoSource(SourceConfig):
    """Images and their objects in COCO format.

    Example:
        >>> source = CocoSource(format="coco", images="signs/train", annotations="signs/train.json")
        >>> source.open(Path("/data"))
        Traceback (most recent call last):
        allinone_ds.errors.DataError: /data/signs/train: 'images' must be a folder, it does not exist; ...
    """

    format: Literal["coco"]
    images: PathText
    """Folder that every `file_name` in the json is relative to."""
    annotations: PathText
    """The json file."""
    kind: Literal["detection", "keypoints", "instances"] = "detection"
    """What is read of an object beside its box and class: nothing, its keypoints, or its mask (polygons, run lengths).
    """
    flip_pairs: list[tuple[int | str, int | str]] | None = None
    """Keypoints: names or numbers (from 0) of the points that a mirrored image swaps; null: those whose names differ
    in left and right."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> CocoSource:
        """Refuse options of other kinds, which would change nothing."""
        if self.kind != "keypoints" and self.flip_pairs is not None:
            raise ConfigError(f"flip_pairs is an option of kind keypoints, the kind is {self.kind}; remove it")
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> CocoDataset:
        return CocoDataset(self, root, classes)


class CocoDataset(SampleDataset):
    """Images and objects of one COCO json.

    Category ids may be any numbers: they become 0..K-1 in ascending order, and `category_ids` maps back. Images
    without a box stay in the dataset. Crowd boxes have `iscrowd` True in the sample; the detection task excludes them
    from training. Boxes are cut at the border of the image; those without area are left out, and `check` reports them.

    Args:
        source: folder and json file.
        root: folder that relative paths start at.
        classes: class names of the train set, whose order the labels follow; None for the order of the category ids.
        content: the content of a COCO json, if it comes from elsewhere; whether its images exist is not checked then.

    Raises:
        DataError: the folder is missing, or the json is not a COCO json. Missing files, images that are not listed,
            boxes outside their image and unknown ids are kept in `structural`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> content = {
        ...     "images": [{"id": 7, "file_name": "1.png", "height": 20, "width": 30}],
        ...     "categories": [{"id": 90, "name": "sign"}],
        ...     "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 4, 10, 5]}],
        ... }
        >>> source = CocoSource(format="coco", images=".", annotations="boxes.json")
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Image.new("RGB", (30, 20)).save(Path(root, "1.png"))
        ...     _ = Path(root, "boxes.json").write_text(json.dumps(content))
        ...     sample = CocoDataset(source, Path(root))[0]
        >>> sample["boxes"].tolist(), sample["labels"].tolist()
        ([[2.0, 4.0, 12.0, 9.0]], [0])
    """

    in_memory = True

    def __init__(
        self,
        source: CocoSource,
        root: Path,
        classes: Sequence[str] | None = None,
        content: dict[str, list[Any]] | None = None,
    ):
        self.kind = source.kind
        self.name = str(root / source.annotations)
        self.folder = root / source.images
        require_folder(self.folder, "images")
        self.structural: list[Problem] = []
        lists = _read_json(Path(self.name)) if content is None else content
        self._read_categories(lists["categories"], classes)
        by_label = {self._label_of[c["id"]]: c for c in lists["categories"]}
        categories = [by_label.get(label) for label in range(len(self.classes))]
        self._points = PointNames(self.name, categories, source.flip_pairs)
        index_of = self._read_images(lists["images"])
        self._read_boxes(lists["annotations"], index_of)
        if content is None:
            self.structural += check_listed_files(self.folder, self.files)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        size = (image.shape[1], image.shape[2])
        stated = self._stated_size(index)
        if stated is not None and stated != size:
            raise BrokenSample(
                path,
                f"is {size[1]} x {size[0]} (width x height, upright), "
                f"{self.name} says {stated[1]} x {stated[0]}; correct the annotation or the file",
            )
        own = slice(self._first[index], self._first[index + 1])
        more = self._parts(own, size, path)
        fields = detection_fields(self._boxes[own], self._labels[own], self._crowd[own], size, more)
        if self.kind == "keypoints":
            fields["corner"] = corner(size)
        return {"image": image, **fields, "path": path, "index": index}

    def annotation(self, index: int) -> Sample:
        own = slice(*self._first[index : index + 2].tolist())
        fields = {"boxes": self._boxes[own], "labels": self._labels[own], "iscrowd": self._crowd[own]}
        if self.kind == "keypoints":
            fields["visible"] = self._keypoints[own][..., 2]
        return {**fields, "size": self._stated_size(index)}

    def _stated_size(self, index: int) -> tuple[int, int] | None:
        height, width = self.sizes[index].tolist()
        return (height, width) if height else None

    def _parts(self, own: slice, size: tuple[int, int], path: str) -> Sample:
        """Return the masks, or the keypoints and areas, of the objects of an image."""
        if self.kind == "instances":
            masks = [decode_mask(json.loads(text), size, path) for text in self._segmentations[own]]
            stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
            return {"masks": tv_tensors.Mask(torch.from_numpy(stacked))}
        if self.kind == "keypoints":
            orders = self._orders[self._labels[own]]
            return keypoint_fields(self._keypoints[own], self._areas[own], orders, size)
        return {}

    def check(self, index: int) -> list[Problem]:
        problems = super().check(index)
        boxes = self._boxes[self._first[index] : self._first[index + 1]]
        for box in boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]:
            corners = ", ".join(f"{v:g}" for v in box)
            reason = f"box (x1 y1 x2 y2 = {corners}) has no area and is not used in training; remove the annotation"
            problems.append(Problem(self.path(index), reason, "warning"))
        return problems

    def _read_categories(self, records: list[Any], classes: Sequence[str] | None) -> None:
        """Set `classes`, `category_ids` (original id by label) and `_label_of` (label by original id)."""
        names: dict[int, str] = {}
        for record in records:
            if not isinstance(record, dict) or not _is_id(record.get("id")) or record.get("name") is None:
                raise DataError(f"{self.name}: category {record!r} needs 'id' and 'name', the id a number")
            if record["id"] in names:
                raise DataError(f"{self.name}: category id {record['id']!r} is used twice; give each a unique id")
            names[record["id"]] = str(record["name"])
        if not names:
            raise DataError(f"{self.name}: 'categories' is empty; list every class with its id and name")
        if len({isinstance(i, str) for i in names}) > 1:
            raise DataError(
                f"{self.name}: category ids are both numbers and strings ({list(names)}); make all of them numbers"
            )
        ids = sorted(names)
        label_of = match_classes(self.name, [names[i] for i in ids], classes)
        self.classes = [names[i] for i in ids] if classes is None else list(classes)
        self._label_of = {category: label_of[n] for n, category in enumerate(ids)}
        self.category_ids: list[int | None] = [None] * len(self.classes)
        for category, label in self._label_of.items():
            self.category_ids[label] = category

    def _read_images(self, records: list[Any]) -> dict[Any, int]:
        """Set `files` and `sizes` (N, 2) (H, W from the json or the file's header, or 0, 0); return {id: index}."""
        files: list[str] = []
        sizes: list[tuple[int, int]] = []
        index_of: dict[Any, int] = {}
        for record in records:
            if not isinstance(record, dict) or not _is_id(record.get("id")) or not record.get("file_name"):
                reason = f"image {record!r} needs 'id' and 'file_name', the id a number or a text"
                self.structural.append(Problem(self.name, reason))
                continue
            file = str(record["file_name"])
            if record["id"] in index_of:
                reason = f"image id {record['id']!r} is used twice in {self.name}; give each image a unique id"
                self.structural.append(Problem(str(self.folder / file), reason))
                continue
            height, width = record.get("height"), record.get("width")
            index_of[record["id"]] = len(files)
            files.append(file)
            if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
                sizes.append((height, width))
            else:
                sizes.append(image_size(os.path.join(self.folder, file)) or (0, 0))
        self.files = Texts(files)
        self.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        return index_of

    def _read_boxes(self, records: list[Any], index_of: dict[Any, int]) -> None:
        """Set boxes (n, 4) XYXY, labels (n,) and crowd flags (n,), sorted by image, and each image's first box."""
        columns = self._columns(records, index_of) if self.kind == "detection" else None
        if columns is None:  # looking at each of a million annotations takes ten times as long
            records = [record for record in records if self._is_usable(record, index_of)]
            columns = self._columns(records, index_of)
            assert columns is not None
        owner, labels, boxes = columns
        sizes = np.where(self.sizes > 0, self.sizes, np.inf)[owner]  # (n, 2): H, W
        for n in np.flatnonzero(boxes_outside(boxes, (sizes[:, 0], sizes[:, 1]))):
            stated = self._stated_size(owner[n]) or (0, 0)
            self.structural.append(Problem(self.path(owner[n]), outside_reason(boxes[n], stated)))
        if are_fractions(boxes):
            self.structural.append(Problem(self.name, FRACTIONS_REASON))
        repeated = len(boxes) - _different_rows(np.column_stack([boxes, owner, labels]))
        if repeated:
            reason = f"{repeated} boxes repeat another box of the same image, category and position; keep one of each"
            self.structural.append(Problem(self.name, reason, "warning"))
        order = np.argsort(owner, kind="stable")
        self._boxes = boxes[order]
        self._labels = labels[order]
        crowd = [record.get("iscrowd") in (1, "1") for record in records]  # bool("0") would be True
        self._crowd = np.array(crowd, dtype=bool)[order]
        self._first = np.searchsorted(owner[order], np.arange(len(self.files) + 1))
        if self.kind == "instances":
            self._segmentations = Texts(json.dumps(records[n]["segmentation"]) for n in order)
        if self.kind == "keypoints":
            self._set_keypoints([records[n] for n in order], owner[order])

    def _columns(self, records: list[Any], index_of: dict[Any, int]) -> tuple[np.ndarray, ...] | None:
        """Return the image (n,), label (n,) and box (n, 4) XYXY of all annotations; None if one of them has a fault."""
        try:
            owner = [index_of[record["image_id"]] for record in records]
            labels = [self._label_of[record["category_id"]] for record in records]
            boxes = np.array([record["bbox"] for record in records] or np.empty((0, 4)))
        except (KeyError, TypeError, ValueError):
            return None
        if boxes.shape[1:] != (4,) or boxes.dtype.kind not in "biuf":
            return None
        boxes = boxes.astype(np.float64)
        if not (np.abs(boxes) < 1e9).all():  # also false for NaN
            return None
        boxes[:, 2:] += boxes[:, :2]
        return np.array(owner, dtype=np.int64), np.array(labels, dtype=np.int64), boxes.astype(np.float32)

    def _is_usable(self, record: Any, index_of: dict[Any, int]) -> bool:
        """Return whether an annotation has no fault; add the fault to `structural` if it has one."""
        problem = self._annotation_problem(record, index_of)
        self.structural += [] if problem is None else [problem]
        return problem is None

    def _set_keypoints(self, records: list[dict[str, Any]], owner: np.ndarray) -> None:
        """Set keypoints (n, P, 3), areas (n,) and the order of the points in a mirrored image (K, P)."""
        if self._points.count is None and not records:
            self._points.settle(0)
        P = self._points.count or 0
        points = np.stack([split_points(r.get("keypoints"), P) for r in records]) if records else np.zeros((0, P, 3))
        self._keypoints = points.astype(np.float32)
        sides = self._boxes[:, 2:] - self._boxes[:, :2]
        stated = [r.get("area") for r in records]
        self._areas = np.array(
            [a if isinstance(a, int | float) and a > 0 else w * h for a, (w, h) in zip(stated, sides, strict=True)],
            dtype=np.float32,
        )
        self._orders = self._points.orders()
        if warning := self._points.warning():
            self.structural.append(warning)
        seen = self._keypoints[self._keypoints[..., 2] > 0][:, :2]
        if len(seen) > 1 and 0 < seen.max() <= 1:
            self.structural.append(Problem(self.name, POINT_FRACTIONS_REASON))
        outside = sum(
            int(points_outside(self._keypoints[n], size).sum())
            for n, i in enumerate(owner.tolist())
            if (size := self._stated_size(i)) is not None
        )
        if outside:
            reason = f"{outside} keypoints lie outside of their images and are not used in training; correct them"
            self.structural.append(Problem(self.name, reason, "warning"))

    def _annotation_problem(self, record: Any, index_of: dict[Any, int]) -> Problem | None:
        """Return what makes an annotation unusable, or None."""
        if not isinstance(record, dict):
            return Problem(self.name, f"annotation {record!r} must be an object")
        where = f"annotation {record.get('id', '(without id)')}"
        image = record.get("image_id")
        if not _is_id(image) or image not in index_of:
            reason = f"image_id {image!r} is not among 'images'; add the image or remove the annotation"
            return Problem(self.name, f"{where}: {reason}")
        category = record.get("category_id")
        if not _is_id(category) or category not in self._label_of:
            known = ", ".join(str(i) for i in list(self._label_of)[:20]) + (", ..." if len(self._label_of) > 20 else "")
            reason = f"category_id {category!r} is not among 'categories' ({known}); correct it"
            return Problem(self.path(index_of[image]), f"{where}: {reason}")
        box: Any = record.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not numbers or not all(abs(v) < 1e9 for v in box):  # also false for NaN
            reason = f"bbox {box!r} must be four numbers: x, y, width, height in pixels"
            return Problem(self.path(index_of[image]), f"{where}: {reason}")
        fault = None
        if self.kind == "instances":
            fault = segmentation_fault(record.get("segmentation"), self._stated_size(index_of[image]))
            if fault is None and apart(record["segmentation"], box):
                fault = f"segmentation lies outside of the object's bbox {box!r}; correct one of them"
        elif self.kind == "keypoints":
            points = record.get("keypoints")
            fault = keypoint_fault(points, self._points.count)
            if fault is None and points is not None:
                self._points.settle(len(points) // 3)
        return None if fault is None else Problem(self.path(index_of[image]), f"{where}: {fault}")


def _different_rows(numbers: np.ndarray) -> int:
    """Return how many of the rows of numbers, float64 (n, C), are different."""
    bits = (numbers + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    factors = np.arange(1, 2 * numbers.shape[1], 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys = ((bits ^ bits >> np.uint64(32)) * factors).sum(axis=1)  # equal for equal rows, seldom for others
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    alike = numbers[counts[place] > 1]
    return len(numbers) - len(alike) + len(np.unique(alike, axis=0))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _read_json(file: Path) -> dict[str, list[Any]]:
    """Return the content of a COCO json, which has the three lists."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: is not valid json (line {error.lineno}: {error.msg}); write it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: a COCO json needs the list '{key}', which is missing; add it")
    return content
