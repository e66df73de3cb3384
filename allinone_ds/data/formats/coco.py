"""Detection from COCO json: boxes of a folder of images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision import tv_tensors

from allinone_ds.data.base import (
    FRACTIONS,
    Problem,
    Sample,
    SampleDataset,
    SourceConfig,
    are_fractions,
    boxes_outside,
    match_classes,
    need_folder,
    outside_reason,
    read_text,
)
from allinone_ds.data.images import compare_files, image_size, read_image
from allinone_ds.errors import BrokenSample, DataError


class CocoSource(SourceConfig):
    """Boxes in COCO format."""

    format: Literal["coco"]
    images: str
    """Folder that the json's `file_name`s are relative to."""
    annotations: str
    """The json file."""


class CocoDataset(SampleDataset):
    """Images and boxes of one COCO json.

    Category ids may be any numbers: they become 0..K-1 in the order of the ids (`category_ids` leads back).
    Images without a box stay in the set. Crowd boxes stay in the sample with `iscrowd` True: a detection task
    leaves them out when it collates. Boxes are cut at the image's border; boxes without area are left out
    (and told by `check`).

    Args:
        source: folder and file.
        root: what relative paths start at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a json that cannot be read; in strict mode also for missing files, no image,
            boxes outside their image and ids that point nowhere.
    """

    kind = "detection"

    def __init__(self, source: CocoSource, root: Path, classes: list[str] | None = None, strict: bool = True):
        self.name = str(root / source.annotations)
        self.folder = root / source.images
        need_folder(self.folder, "images")
        content = _read(Path(self.name))
        self.structural: list[Problem] = []
        self._read_categories(content["categories"], classes)
        place = self._read_images(content["images"])
        self._read_boxes(content["annotations"], place)
        if classes is None:
            self._tell_unused()
        self.structural += compare_files(self.folder, self.files)
        self.settle(strict)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        size = (image.shape[1], image.shape[2])
        stated = self.sizes[index]
        if stated is not None and stated != size:
            raise BrokenSample(
                path,
                f"is {size[1]} x {size[0]} (width x height, upright), "
                f"{self.name} says {stated[1]} x {stated[0]}; correct the annotation or the file",
            )
        mine = slice(self._first[index], self._first[index + 1])
        boxes = self._boxes[mine].copy()
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[keep]), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
            ),
            "labels": torch.from_numpy(self._labels[mine][keep]),
            "iscrowd": torch.from_numpy(self._crowd[mine][keep]),
            "path": path,
            "index": index,
        }

    def check(self, index: int) -> list[Problem]:
        found = super().check(index)
        boxes = self._boxes[self._first[index] : self._first[index + 1]]
        for box in boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]:
            corners = ", ".join(f"{v:g}" for v in box)
            reason = f"box (x1 y1 x2 y2 = {corners}) has no area, left out of training; remove the annotation"
            found.append(Problem(self.path(index), reason, "warning"))
        return found

    def _read_categories(self, records: list[Any], classes: list[str] | None) -> None:
        """Sets `classes`, `category_ids` (original id by label) and the way from id to label."""
        names: dict[int, str] = {}
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("id"), int | str) or "name" not in record:
                raise DataError(f"{self.name}: category {record!r} needs 'id' and 'name', the id a number")
            if record["id"] in names:
                raise DataError(f"{self.name}: category id {record['id']!r} is used twice; give each its own")
            names[record["id"]] = str(record["name"])
        if not names:
            raise DataError(f"{self.name}: 'categories' is empty; list every class with its id and name")
        if len({isinstance(i, str) for i in names}) > 1:
            raise DataError(
                f"{self.name}: category ids are numbers and texts ({list(names)}); make all of them numbers"
            )
        ids = sorted(names)
        places = match_classes(self.name, [names[i] for i in ids], classes)
        self.classes = [names[i] for i in ids] if classes is None else list(classes)
        self._label = {identity: places[n] for n, identity in enumerate(ids)}
        self.category_ids: list[int | None] = [None] * len(self.classes)
        for identity, label in self._label.items():
            self.category_ids[label] = identity

    def _read_images(self, records: list[Any]) -> dict[Any, int]:
        """Sets `files`, `image_ids`, `sizes` ((H, W), from json or file header); returns {id: index}."""
        self.files: list[str] = []
        self.image_ids: list[Any] = []
        self.sizes: list[tuple[int, int] | None] = []
        place: dict[Any, int] = {}
        for record in records:
            if not isinstance(record, dict) or "id" not in record or not record.get("file_name"):
                self.structural.append(Problem(self.name, f"image {record!r} needs 'id' and 'file_name'"))
                continue
            file = str(record["file_name"])
            if record["id"] in place:
                self.structural.append(
                    Problem(str(self.folder / file), f"image id {record['id']!r} is used twice in {self.name}")
                )
                continue
            height, width = record.get("height"), record.get("width")
            place[record["id"]] = len(self.files)
            self.files.append(file)
            self.image_ids.append(record["id"])
            if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
                self.sizes.append((height, width))
            else:
                self.sizes.append(image_size(os.path.join(self.folder, file)))
        return place

    def _read_boxes(self, records: list[Any], place: dict[Any, int]) -> None:
        """Sets boxes (n, 4) XYXY, labels (n,), crowd flags (n,) sorted by image, and where an image's start."""
        rows, owners, labels, crowd = [], [], [], []
        for record in records:
            fault = self._fault(record, place)
            if fault:
                self.structural.append(fault)
                continue
            x, y, w, h = record["bbox"]
            rows.append((x, y, x + w, y + h))
            owners.append(place[record["image_id"]])
            labels.append(self._label[record["category_id"]])
            crowd.append(record.get("iscrowd") in (1, "1"))  # as a text "0" it would count as true
        boxes = np.array(rows, dtype=np.float32).reshape(-1, 4)
        owner = np.array(owners, dtype=np.int64)
        for n, index in enumerate(owners):
            size = self.sizes[index]
            if size is not None and boxes_outside(boxes[n : n + 1], size)[0]:
                self.structural.append(Problem(self.path(index), outside_reason(boxes[n], size)))
        if are_fractions(boxes):
            self.structural.append(Problem(self.name, FRACTIONS))
        twice = len(boxes) - len(np.unique(np.column_stack([boxes, owner, labels]), axis=0))
        if twice:
            reason = f"{twice} boxes stand there twice, of the same image, category and place; keep one of each"
            self.structural.append(Problem(self.name, reason, "warning"))
        order = np.argsort(owner, kind="stable")
        self._boxes = boxes[order]
        self._labels = np.array(labels, dtype=np.int64)[order]
        self._crowd = np.array(crowd, dtype=bool)[order]
        self._first = np.searchsorted(owner[order], np.arange(len(self.files) + 1))

    def _tell_unused(self) -> None:
        """A train set's categories without a box: nothing can be learned of them."""
        used = set(self._labels.tolist())
        unused = [name for label, name in enumerate(self.classes) if label not in used]
        if unused and used:
            shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            reason = f"no box has category {shown} ({len(unused)} of {len(self.classes)}); add boxes or remove it"
            self.structural.append(Problem(self.name, reason, "warning"))

    def _fault(self, record: Any, place: dict[Any, int]) -> Problem | None:
        """What makes one annotation unusable, if anything."""
        if not isinstance(record, dict):
            return Problem(self.name, f"annotation {record!r} must be an object")
        here = f"annotation {record.get('id', '(without id)')}"
        image = record.get("image_id")
        if image not in place:
            return Problem(self.name, f"{here}: image_id {image!r} is not among 'images'; add the image or remove it")
        file = self.path(place[image])
        category = record.get("category_id")
        if category not in self._label:
            known = ", ".join(str(i) for i in list(self._label)[:20]) + (", ..." if len(self._label) > 20 else "")
            return Problem(file, f"{here}: category_id {category!r} is not among 'categories' ({known}); correct it")
        box = record.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not numbers or not np.isfinite(np.asarray(box, dtype=np.float64)).all():
            return Problem(file, f"{here}: bbox {box!r} must be four numbers: x, y, width, height in pixels")
        return None


def _read(file: Path) -> dict[str, list[Any]]:
    """The json, checked for its three lists."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: is not valid json (line {error.lineno}: {error.msg}); write it anew") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: a COCO json needs the list '{key}'; it has none")
    return content
