"""Segmentation from label maps: one png of class ids or of colours per image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator
from torchvision import tv_tensors

from allinone_ds.data.base import IGNORE, Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.common.listing import require_folder
from allinone_ds.data.formats.common.masks import (
    check_mask_size,
    check_numbering,
    color_number,
    color_text,
    colors_to_labels,
    ids_to_labels,
    single_class_warning,
    validate_class_ids,
)
from allinone_ds.data.formats.common.paired_files import pair_files
from allinone_ds.data.images import read_color_map, read_image, read_label_map
from allinone_ds.errors import ConfigError, DataError
from allinone_ds.strict import PathText

Color = Annotated[int, BeforeValidator(color_number)]
"""A colour as one number, see `color_number`."""


class LabelMapsSource(SourceConfig):
    """Images and label maps of equal relative paths except for suffixes (`a/1.jpg` belongs to `a/1.png`).

    Example:
        >>> source = LabelMapsSource(format="label_maps", images="images", label_maps="maps", classes=["road", "sky"])
        >>> source.ignore_index, source.first_id
        (255, 0)
    """

    format: Literal["label_maps"]
    images: PathText
    """Folder of the images."""
    label_maps: PathText
    """Folder of the label maps: one channel, in which the value of a pixel is its class id, or colours."""
    label_map_suffix: str = ""
    """What ends the name of a label map: with "_train_id", `a/1.jpg` belongs to `a/1_train_id.png`."""
    image_suffix: str = ""
    """What ends the name of an image: Cityscapes has "_leftImg8bit", and "_gtFine_labelTrainIds" for its label maps."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; at most 255. null: those of the task,
    or of the train set."""
    ignore_index: int = Field(default=255, ge=0)
    """Value of the pixels without a class."""
    first_id: int = Field(default=0, ge=0)
    """Id of the first class: 1 if 0 stands for pixels without a class (ADE20K, with `ignore_index: 0`)."""
    class_ids: list[NonNegativeInt] | None = None
    """Id of each class where they do not count up, e.g. [0, 255]; null: they count from `first_id`. An id in this list
    is a class even if it equals `ignore_index`."""

    class_colors: list[Color] | None = Field(default=None, min_length=1)
    """Colour of each class, "#rrggbb" or [red, green, blue], for label maps whose colours are the classes; null: the
    value of a pixel is its class id."""
    ignore_colors: list[Color] = Field(default=[])
    """Colours of the pixels without a class."""

    @model_validator(mode="after")
    def _one_numbering(self) -> LabelMapsSource:
        check_numbering(self.class_ids, self.first_id)
        if self.class_colors is None:
            if self.ignore_colors:
                raise ConfigError("ignore_colors without class_colors: give the colours of the classes too")
            return self
        options = ("class_ids", "first_id", "ignore_index")  # compared by value: a run's file holds defaults too
        ids = [name for name in options if getattr(self, name) != type(self).model_fields[name].default]
        if ids:
            raise ConfigError(f"'{ids[0]}' is for label maps of ids, 'class_colors' for label maps of colours; remove "
                              "one of them")  # fmt: skip
        colors = Counter([*self.class_colors, *self.ignore_colors])
        twice = [color_text(color) for color, count in colors.items() if count > 1]
        if twice:
            raise ConfigError(f"class_colors, ignore_colors: {', '.join(twice)} is listed more than once; give each "
                              "class a colour of its own")  # fmt: skip
        return self

    def open(self, root: Path, classes: Sequence[str] | None = None) -> LabelMapsDataset:
        return LabelMapsDataset(self, root, classes)


class LabelMapsDataset(SampleDataset):
    """All images below a folder, each with the label map of the same relative path.

    In the mask of a sample, pixels without a class are 255 whatever value the files use.

    Args:
        source: folders, class names and pixel values.
        root: folder that relative paths start at.
        classes: class names of the train set, whose order the labels follow; None for the order of the class ids.
        names: relative paths without suffixes of the images to use; None uses all.

    Raises:
        DataError: a folder is missing, or there are more than 255 classes. Images without a label map, label maps
            without an image and names that are used twice are kept in `structural`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> source = LabelMapsSource(format="label_maps", images="images", label_maps="maps", classes=["road", "sky"])
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder, mode in (("images", "RGB"), ("maps", "L")):
        ...         Path(root, folder).mkdir()
        ...         Image.new(mode, (3, 2), 1).save(Path(root, folder, "1.png"))
        ...     LabelMapsDataset(source, Path(root))[0]["mask"].tolist()
        [[1, 1, 1], [1, 1, 1]]
    """

    kind = "segmentation"

    def __init__(
        self,
        source: LabelMapsSource,
        root: Path,
        classes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.images = root / source.images
        self.maps = root / source.label_maps
        self.name = str(self.maps)
        self.source = source
        require_folder(self.images, "images")
        require_folder(self.maps, "label_maps")
        stored = read_classes(source.classes, root)
        stored = list(classes) if stored is None and classes is not None else stored
        if stored is None:
            raise DataError(f"{self.name}: label maps hold no class names; set 'classes' of the source or of the task")
        if source.class_colors is None:
            validate_class_ids(self.name, len(stored), source.first_id, source.ignore_index, source.class_ids)
        elif len(source.class_colors) != len(stored) or len(stored) > IGNORE:
            raise DataError(f"{self.name}: class_colors has {len(source.class_colors)} colours for {len(stored)} "
                            "classes; give each class one colour, at most 255")  # fmt: skip
        label_of = match_classes(self.name, stored, classes)
        self.classes = stored if classes is None else list(classes)
        self._labels = np.array([label_of[i] for i in range(len(stored))], dtype=np.uint8)
        self.pairs, self.structural = pair_files(
            (self.images, source.image_suffix), (self.maps, source.label_map_suffix), "label map", names=names
        )
        if source.class_colors is None:
            self.structural += single_class_warning(self, source.ignore_index)
        elif source.ignore_colors:
            ignored = ", ".join(map(color_text, source.ignore_colors))
            self.structural += single_class_warning(self, ignored, "list it in class_colors")

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, index: int) -> str:
        return os.path.join(self.images, self.pairs[index][0])

    def __getitem__(self, index: int) -> Sample:
        path = self.path(index)
        image = read_image(path)
        mask = self.mask(index)
        check_mask_size(mask, image, self._map_path(index))
        return {
            "image": image,
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "path": path,
            "index": index,
        }

    def annotation(self, index: int) -> Sample:
        return {"mask": self.mask(index)}

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one sample, uint8 (H, W), without reading its image.

        Raises:
            BrokenSample: the label map cannot be read, or contains a value that is not a class.
        """
        path = self._map_path(index)
        source = self.source
        if source.class_colors is not None:
            return colors_to_labels(read_color_map(path), path, self._labels, source.class_colors, source.ignore_colors)
        stored = read_label_map(path)
        return ids_to_labels(stored, path, self._labels, source.ignore_index, source.first_id, source.class_ids)

    def _map_path(self, index: int) -> str:
        return os.path.join(self.maps, self.pairs[index][1])
