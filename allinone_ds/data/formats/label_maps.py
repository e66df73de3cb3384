"""Segmentation from label maps: one png of class ids or of colours per image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision import tv_tensors

from allinone_ds.data.base import Sample, SampleDataset, SourceConfig
from allinone_ds.data.formats.common.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.common.listing import require_folder
from allinone_ds.data.formats.common.mask_values import MaskValues
from allinone_ds.data.formats.common.masks import check_mask_size
from allinone_ds.data.formats.common.paired_files import pair_files
from allinone_ds.data.formats.common.texts import Texts
from allinone_ds.data.images import read_image
from allinone_ds.errors import DataError
from allinone_ds.strict import PathText


class LabelMapsSource(MaskValues, SourceConfig):
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
        source.fit_classes(self.name, len(stored))
        label_of = match_classes(self.name, stored, classes)
        self.classes = stored if classes is None else list(classes)
        self._labels = np.array([label_of[i] for i in range(len(stored))], dtype=np.uint8)
        pairs, self.structural = pair_files(
            (self.images, source.image_suffix), (self.maps, source.label_map_suffix), "label map", names=names
        )
        self.files, self._map_files = Texts(image for image, _ in pairs), Texts(stored for _, stored in pairs)
        self.structural += source.single_class(self)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return os.path.join(self.images, self.files[index])

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
        return self.source.read_mask(self._map_path(index), self._labels)

    def _map_path(self, index: int) -> str:
        return os.path.join(self.maps, self._map_files[index])
