"""YOLO: one text file per image, with a class id and a box or an outline in fractions of the image per line."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from pydantic import model_validator
from torchvision import tv_tensors

from allinone_ds.data.base import Problem, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.boxes import detection_fields
from allinone_ds.data.formats.common.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.common.listing import (
    check_listed_files,
    is_image,
    list_files,
    read_text,
    unread_files,
    walk_files,
    walk_images,
)
from allinone_ds.data.formats.common.masks import validate_class_ids
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import image_size, read_image
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText, did_you_mean, expand_path

BACKGROUND = "background"
"""Class of the pixels outside all outlines."""

_TOLERANCE = 0.01  # fraction of the image by which coordinates may exceed it, as in ultralytics
_NOT_LABELS = frozenset({"classes.txt", "train.txt", "val.txt", "test.txt"})


class YoloSource(SourceConfig):
    """Images and labels as ultralytics reads them: either a data.yaml, or folders of images.

    The label file of `A/images/B/1.jpg` is `A/labels/B/1.txt`; the last folder called images counts. Without such a
    folder it lies beside the image. An image without a label file has no objects.

    Example:
        >>> YoloSource(format="yolo", data="signs/data.yaml", split="val").kind
        'detection'
    """

    format: Literal["yolo"]
    data: PathText | None = None
    """The data.yaml, with `names`, `path` and a key per split."""
    split: str = "train"
    """Key of data.yaml: train, val or test."""
    images: PathText | list[PathText] | None = None
    """Instead of `data`: folders of images, or text files with one image per line."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; null: those of data.yaml or of the
    task."""
    kind: Literal["detection", "segmentation"] = "detection"
    """detection: boxes, and the boxes around outlines; segmentation: the insides of outlines, where small ones lie
    above large ones, and a first class "background" unless there is a class of that name."""

    @model_validator(mode="after")
    def _one_place(self) -> YoloSource:
        if (self.data is None) == (self.images is None):
            raise ConfigError("set either 'data' (a data.yaml) or 'images' (folders of images)")
        if self.images is not None and "split" in self.model_fields_set and self.split != "train":
            raise ConfigError("'split' is a key of data.yaml and has no effect with 'images'; remove it")
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> YoloDataset:
        return YoloDataset(self, root, classes)


class YoloDataset(SampleDataset):
    """Images with the boxes or outlines of their label files.

    Boxes are cut at the border of the image. Lines that repeat an object of the same image are used once.

    Args:
        source: places of the files, and the kind.
        root: folder that relative paths start at.
        classes: class names of the train set, whose order the labels follow; None for the order of the ids.

    Raises:
        DataError: a file or folder is missing, data.yaml does not hold what is needed, or no image has a label file.
            Lines that cannot be used are kept in `structural`.

    Example:
        >>> import tempfile
        >>> source = YoloSource(format="yolo", images="images", classes=["sign"])
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("images", "labels"):
        ...         Path(root, folder).mkdir()
        ...     Image.new("RGB", (40, 20)).save(Path(root, "images", "1.png"))
        ...     _ = Path(root, "labels", "1.txt").write_text("0 0.5 0.5 0.25 0.5\\n")
        ...     YoloDataset(source, Path(root))[0]["boxes"].tolist()
        [[15.0, 5.0, 25.0, 15.0]]
    """

    def __init__(self, source: YoloSource, root: Path, classes: Sequence[str] | None = None):
        self.kind = source.kind
        self.structural: list[Problem] = []
        names = read_classes(source.classes, root)
        if source.data is not None:
            file = root / source.data
            self.name = f"{file}[{source.split}]"
            content = _read_data_yaml(file)
            names = _names(content, file) if names is None else names
            places = _places(content, file, source.split)
            base = _dataset_root(content, file)
        else:
            given = [source.images] if isinstance(source.images, str) else source.images or []
            places = [root / place for place in given]
            self.name, base = ", ".join(map(str, places)), root
        if self.kind == "detection" and names is None and classes is not None:
            names = list(classes)
        if names is None:
            where = "the source or of the task" if self.kind == "detection" else "the source"
            raise DataError(f"{self.name}: the labels hold no class names; set 'classes' of {where}")
        ids = len(names)
        if self.kind == "segmentation" and BACKGROUND not in names:
            names = [BACKGROUND, *names]
        label_of = match_classes(self.name, names, classes)
        self.classes = list(names if classes is None else classes)
        if self.kind == "segmentation":
            validate_class_ids(self.name, len(self.classes), 0, [255])
            self._background = label_of[names.index(BACKGROUND)]
        self._label_of = [label_of[len(names) - ids + i] for i in range(ids)]
        files = sorted({file for place in places for file in _images(place, base)})
        self.structural += [p for p in check_listed_files(Path(), files) if p.level == "error"]
        for place in places:
            if place.is_dir():
                self.structural += unread_files(place, walk_files(place))
        self._read_labels(files, whole_folders=all(place.is_dir() for place in places))
        self.files = Texts(files)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        size = (image.shape[1], image.shape[2])
        sample: Sample = {"image": image, "path": path, "index": index}
        if self.kind == "segmentation":
            return {**sample, "mask": tv_tensors.Mask(torch.from_numpy(self._mask(index, size)))}
        boxes, labels = self._boxes(index, size)
        return {**sample, **detection_fields(boxes, labels, np.zeros(len(boxes), dtype=bool), size)}

    def annotation(self, index: int) -> Sample:
        size = image_size(self.path(index))
        if size is None:
            return super().annotation(index)
        if self.kind == "segmentation":
            return {"mask": self._mask(index, size)}
        boxes, labels = self._boxes(index, size)
        return {"boxes": boxes, "labels": labels, "size": size}

    def _boxes(self, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes (n, 4) XYXY in pixels and the labels (n,) of an image of size (H, W)."""
        objects = self._objects(index)
        rows = [_box(outline) for _, outline in objects]
        scale = np.array([size[1], size[0]] * 2, dtype=np.float64)
        boxes = (np.array(rows, dtype=np.float64).reshape(-1, 4) * scale).astype(np.float32)
        return boxes, np.array([label for label, _ in objects], dtype=np.int64)

    def _mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Return the mask uint8 (H, W) with the outlines of an image filled, the largest first."""
        canvas = Image.new("L", (size[1], size[0]), self._background)
        draw = ImageDraw.Draw(canvas)
        scaled = [(label, outline * (size[1], size[0])) for label, outline in self._objects(index)]
        for label, points in sorted(scaled, key=lambda item: -_area(item[1])):
            # pixel i of Pillow has its centre at i, that of the image at i + 0.5
            draw.polygon([(x - 0.5, y - 0.5) for x, y in points.tolist()], fill=label)
        return np.array(canvas)

    def _objects(self, index: int) -> list[tuple[int, np.ndarray]]:
        """Return labels and outlines (n, 2) of an image, in fractions of it; a box has two corners."""
        objects = range(self._first[index], self._first[index + 1])
        return [(int(self._labels[n]), self._outlines[self._starts[n] : self._starts[n + 1]]) for n in objects]

    def _read_labels(self, files: Sequence[str], whole_folders: bool) -> None:
        """Set the objects of all images in arrays, which the workers of a loader share."""
        first, starts, labels, corners = array("q", [0]), array("q", [0]), array("q"), array("d")
        listed: dict[str, set[str]] = {}
        missing, boxes, used = [], 0, set()
        for file in files:
            label_file = label_path(file)
            folder, name = os.path.split(label_file)
            if folder not in listed:
                listed[folder] = set(list_files(Path(folder)))
            if name not in listed[folder]:
                missing.append(file)
                first.append(len(labels))
                continue
            used.add(label_file)
            for label, outline in self._read_label_file(label_file):
                labels.append(label)
                corners.frombytes(outline.tobytes())
                starts.append(len(corners) // 2)
                boxes += len(outline) == 2
            first.append(len(labels))
        self._first, self._starts = np.frombuffer(first, np.int64), np.frombuffer(starts, np.int64)
        self._labels = np.array(labels, dtype=np.int64)
        self._outlines = np.array(corners, dtype=np.float64).reshape(-1, 2)
        objects = len(labels)
        if files and not used:
            raise DataError(f"{self.name}: none of the {len(files)} images has a label file (the first would be "
                            f"{label_path(files[0])}); put the labels into 'labels' beside 'images'")  # fmt: skip
        if missing:
            reason = f"{len(missing)} of {len(files)} images have no label file and count as images without objects"
            self.structural.append(Problem(self.name, f"{reason} (first: {missing[0]})", "warning"))
        if files and not objects and not self.structural:
            self.structural.append(Problem(self.name, "the label files contain no object; there is nothing to learn"))
        if self.kind == "segmentation" and boxes:
            reason = f"{boxes} of {objects} labels are boxes, not outlines; use kind: detection, or label outlines"
            self.structural.append(Problem(self.name, reason))
        stray = [
            os.path.join(folder, name)
            for folder, names in listed.items()
            for name in names
            if whole_folders
            and name.endswith(".txt")
            and name not in _NOT_LABELS
            and os.path.join(folder, name) not in used
        ]
        if stray:
            reason = f"{len(stray)} label files belong to no image of the split (first: {min(stray)})"
            self.structural.append(Problem(self.name, reason, "warning"))

    def _read_label_file(self, file: str) -> list[tuple[int, np.ndarray]]:
        """Return the objects of a label file; add a fault per line that cannot be used."""
        try:
            lines = read_text(Path(file)).splitlines()
        except DataError as error:
            self.structural.append(Problem(file, str(error).removeprefix(f"{file}: ")))
            return []
        objects: dict[tuple[float, ...], tuple[int, np.ndarray]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = tuple(float(word) for word in line.split())
                outline = self._outline(values)
            except ValueError as error:
                self.structural.append(Problem(file, f"line {number}: {_shortened(line)}: {error}"))
                continue
            if (outline.max(axis=0) <= outline.min(axis=0)).any():
                reason = f"line {number}: has no area and is not used in training; remove the line"
                self.structural.append(Problem(file, reason, "warning"))
                continue
            if values in objects:
                self.structural.append(Problem(file, f"line {number}: repeats an object; it is used once", "warning"))
            objects[values] = (self._label_of[int(values[0])], outline)
        return list(objects.values())

    def _outline(self, values: tuple[float, ...]) -> np.ndarray:
        """Return the outline (n, 2) of the numbers of a line; the two corners of a box.

        Raises:
            ValueError: says what is wrong with the numbers.
        """
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise ValueError(f"has {len(values)} numbers; write `class x y width height`, or `class` and three or more "
                             "points `x y`")  # fmt: skip
        if not np.isfinite(values).all():
            raise ValueError("holds a number that is not finite; correct it")
        if values[0] != int(values[0]) or not 0 <= values[0] < len(self._label_of):
            raise ValueError(f"class id {values[0]:g} must lie in 0..{len(self._label_of) - 1}; correct it or 'names'")
        if min(values[1:]) < -_TOLERANCE or max(values[1:]) > 1 + _TOLERANCE:
            raise ValueError("coordinates must be fractions of the image, 0..1; divide pixels by its width and height")
        if len(values) > 5:
            return np.array(values[1:]).reshape(-1, 2)
        x, y, w, h = values[1:]
        return np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]])


def label_path(image: str) -> str:
    """Return the label file of an image: the last folder `images` of its path becomes `labels`.

    Example:
        >>> label_path("/data/images/train/1.jpg"), label_path("/data/train/1.jpg")
        ('/data/labels/train/1.txt', '/data/train/1.txt')
    """
    parts = os.path.splitext(image)[0].split(os.sep)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return os.sep.join(parts) + ".txt"


def _box(outline: np.ndarray) -> np.ndarray:
    """Return the box (4,) XYXY around an outline (n, 2)."""
    return np.concatenate([outline.min(axis=0), outline.max(axis=0)])


def _area(points: np.ndarray) -> float:
    """Return the area inside an outline (n, 2), by the shoelace formula."""
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _shortened(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _read_data_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise DataError(f"{file}: is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must be a mapping with the keys names, train and val")
    return content


def _names(content: dict[str, Any], file: Path) -> list[str] | None:
    """Return the class names of a data.yaml, a list or a mapping of ids; of `nc` alone, names with numbers."""
    names = content.get("names")
    count = content.get("nc")
    if count is not None and not (isinstance(count, int) and count > 0):
        raise DataError(f"{file}: 'nc' is {count!r}; write the number of classes")
    if names is None:
        return None if count is None else [f"class_{i}" for i in range(count)]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(f"{file}: the ids of 'names' are {sorted(names)}; number the classes from 0 without gaps")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: 'names' must be a list of class names, or a mapping of ids to names")
    if count is not None and count != len(names):
        raise DataError(f"{file}: 'nc' is {count}, 'names' has {len(names)}; correct one of them")
    return [str(name) for name in names]


def _dataset_root(content: dict[str, Any], file: Path) -> Path:
    """Return the folder that the splits are relative to: `path` beside data.yaml, or else the folder of data.yaml."""
    given = content.get("path")
    folder = file.parent if given is None else file.parent / expand_path(str(given))
    return folder if folder.is_dir() else file.parent


def _places(content: dict[str, Any], file: Path, split: str) -> list[Path]:
    """Return the folders and lists of a split."""
    keys = [key for key in ("train", "val", "validation", "test") if content.get(key)]
    given = content.get(split) or (content.get("validation") if split == "val" else None)
    if not given:
        raise DataError(f"{file}: has no split '{split}'; {did_you_mean(split, keys)}")
    base = _dataset_root(content, file)
    places = []
    for item in [given] if isinstance(given, str) else given:
        place = base / expand_path(str(item))
        if not place.exists() and str(item).startswith("../"):  # exports are written for a folder deeper
            place = base / str(item)[3:]
        places.append(Path(os.path.normpath(place)))
    return places


def _images(place: Path, base: Path) -> list[str]:
    """Return the images of a folder, or those that a text file lists, one per line.

    A relative line starts at the text file if it begins with "./", else at the data set's folder.
    """
    if place.is_dir():
        return [str(place / file) for file in walk_images(place)]
    if place.suffix != ".txt":
        found = "it is a file" if place.exists() else "it does not exist"
        raise DataError(f"{place}: must be a folder of images or a txt file of paths, {found}; correct the path")
    lines = [line.strip() for line in read_text(place, file_names=True).splitlines()]
    folders = {line: place.parent if line.startswith("./") else base for line in lines}
    return [os.path.normpath(folders[line] / line) for line in lines if is_image(line)]
