"""Pascal VOC: one XML of boxes per image, label maps in SegmentationClass, and lists of names in ImageSets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from pydantic import model_validator

from allinone_ds.data.base import Problem, SampleDataset, SourceConfig
from allinone_ds.data.formats.coco import CocoDataset, CocoSource
from allinone_ds.data.formats.common.class_names import ClassNames, read_classes
from allinone_ds.data.formats.common.listing import read_text, require_folder, walk_images
from allinone_ds.data.formats.common.mask_values import MaskValues
from allinone_ds.data.formats.label_maps import LabelMapsDataset, LabelMapsSource
from allinone_ds.data.images import MISSING_FILE
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText, did_you_mean


class VocSource(MaskValues, SourceConfig):
    """Images and annotations as in VOCdevkit/VOC2012.

    Example:
        >>> source = VocSource(format="voc", path="VOCdevkit/VOC2012", split="val")
        >>> source.kind, source.images, source.annotations
        ('detection', 'JPEGImages', 'Annotations')
    """

    format: Literal["voc"]
    path: PathText
    """Folder that contains the other folders."""
    split: str | None = None
    """Name of a list in ImageSets/Main, or in ImageSets/Segmentation: train, val, trainval or test; null: all files."""
    kind: Literal["detection", "segmentation"] = "detection"
    """detection: boxes of `annotations`; segmentation: label maps in `label_maps`, of ids as in VOC's own files, or of
    colours."""
    images: PathText = "JPEGImages"
    """Folder of the images below `path`."""
    annotations: PathText = "Annotations"
    """Folder of the XML files below `path`."""
    label_maps: PathText = "SegmentationClass"
    """Folder of the label maps below `path`."""
    classes: ClassNames | None = None
    """Class names, or a text file with one name per line. Segmentation: in the order of the ids, the background first.
    Detection: null takes the names in the annotations, in alphabetical order."""

    @model_validator(mode="after")
    def _plain_name(self) -> VocSource:
        if self.split is not None and self.split != os.path.basename(self.split):
            raise ConfigError(f"split = '{self.split}': give the name of a list, for example train")
        return self

    @model_validator(mode="after")
    def _refuse_unused(self) -> VocSource:
        """Refuse options of the other kind, which would change nothing."""
        masks, boxes = ("label_maps", *MaskValues.model_fields), ("annotations",)
        options, kind = (masks, "segmentation") if self.kind == "detection" else (boxes, "detection")
        for option in options:
            if getattr(self, option) != type(self).model_fields[option].default:
                raise ConfigError(f"{option} is an option of kind {kind}, the kind is {self.kind}; remove it")
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        folder = root / self.path
        require_folder(folder, "path")
        require_folder(folder / self.images, "images")
        names = None if self.split is None else self._listed(folder)
        return self._boxes(root, names, classes) if self.kind == "detection" else self._masks(root, names, classes)

    def _listed(self, folder: Path) -> list[str]:
        """Return the names in the list of the split; a second column (-1, 0, 1 in lists of one class) is left out."""
        lists = folder / "ImageSets" / ("Main" if self.kind == "detection" else "Segmentation")
        file = lists / f"{self.split}.txt"
        if not file.is_file():
            known = [path.stem for path in lists.glob("*.txt") if "_" not in path.stem]
            raise DataError(f"{file}: list is missing; {did_you_mean(str(self.split), known)}")
        lines = [line.strip() for line in read_text(file, file_names=True).splitlines()]
        names = [re.sub(r"\s+-?[01]$", "", line) for line in lines if line]
        if not names:
            raise DataError(f"{file}: is empty; write one name per line")
        return list(dict.fromkeys(names))

    def _masks(self, root: Path, names: list[str] | None, classes: Sequence[str] | None) -> LabelMapsDataset:
        images, maps = (os.path.join(self.path, name) for name in (self.images, self.label_maps))
        if names is None:  # the folder of images also holds those without a label map
            require_folder(root / maps, "label_maps")
            names = [os.path.splitext(file)[0] for file in walk_images(root / maps)]
        source = LabelMapsSource(
            format="label_maps", images=images, label_maps=maps, classes=self.classes, **self.mask_values()
        )
        return LabelMapsDataset(source, root, classes, names)

    def _boxes(self, root: Path, names: list[str] | None, classes: Sequence[str] | None) -> CocoDataset:
        folder, annotations = root / self.path / self.images, root / self.path / self.annotations
        require_folder(annotations, "annotations")
        if names is None:
            names = sorted(p.relative_to(annotations).with_suffix("").as_posix() for p in annotations.rglob("*.xml"))
            if not names:
                raise DataError(f"{annotations}: contains no XML file; correct 'annotations'")
        known = frozenset(walk_images(folder))
        file_of = {os.path.splitext(file)[0]: file for file in known}
        problems: list[Problem] = []
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        for name in names:
            xml = annotations / f"{name}.xml"
            try:
                parsed = ElementTree.fromstring(xml.read_bytes())
            except FileNotFoundError:
                problems.append(Problem(str(xml), "annotation is missing; add it or remove the name from the list"))
                continue
            except (ElementTree.ParseError, OSError) as error:
                problems.append(Problem(str(xml), f"is not valid XML ({error}); write it again"))
                continue
            size = [_whole(parsed.findtext(f"size/{side}")) for side in ("height", "width")]
            file = file_of.get(name, os.path.basename(parsed.findtext("filename") or ""))
            if file not in known:
                problems.append(Problem(str(folder / f"{name}.jpg"), MISSING_FILE))
                continue
            content["images"].append({"id": name, "file_name": file, "height": size[0], "width": size[1]})
            for number, item in enumerate(parsed.findall("object"), start=1):
                try:
                    content["annotations"].append(_object(item, name, number))
                except ValueError as error:
                    problems.append(Problem(str(xml), f"object {number}: {error}"))
        found = sorted({annotation["category_id"] for annotation in content["annotations"]})
        given = read_classes(self.classes, root)
        content["categories"] = [{"id": n, "name": n} for n in given or found or classes or ()]
        if not content["categories"]:
            raise DataError(f"{annotations}: the annotations contain no object; there is nothing to learn")
        source = CocoSource(
            format="coco", images=str(Path(self.path, self.images)), annotations=str(Path(self.path, self.annotations))
        )
        order = given if classes is None else classes
        dataset = CocoDataset(source, root, order, content)
        dataset.structural = [*problems, *dataset.structural]
        return dataset


def _object(item: ElementTree.Element, image: str, number: int) -> dict[str, Any]:
    """Return an `<object>` as a COCO annotation; a difficult object is a crowd, which is not trained on.

    The corners of VOC are numbers of pixels from 1 on, both of them inside the object.

    Raises:
        ValueError: says what is missing or wrong.
    """
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no <name>; write the class")
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = item.findtext(f"bndbox/{tag}")
        try:
            corners.append(float(str(text)))
        except ValueError:
            raise ValueError(f"<bndbox> has <{tag}> {text!r}; write a number of pixels") from None
    x1, y1, x2, y2 = corners
    if x2 < x1 or y2 < y1:
        raise ValueError(f"<bndbox> has xmin, ymin, xmax, ymax = {corners}; the maximum must not be the smaller one")
    return {
        "id": f"{image}.xml object {number}",
        "image_id": image,
        "category_id": name,
        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
        "iscrowd": int((item.findtext("difficult") or "0").strip() == "1"),
    }


def _whole(text: str | None) -> int | None:
    """Return a size of an image; None if it is missing, no number or 0, as some tools write it."""
    try:
        return int(float(str(text))) or None
    except ValueError:
        return None
