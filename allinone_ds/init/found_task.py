"""What a recogniser of a layout reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
_WITH_IMAGES = ("coco", "label_maps", "dense_maps", "image_list", "image_table", "box_table")
"""Formats whose `images` are a folder below data_root."""


@dataclass
class FoundTask:
    """One task for which a folder holds data.

    Example:
        >>> FoundTask("classification", "class folders", {"format": "class_folders", "images": "train"}).test is None
        True
    """

    kind: str
    """A key of `allinone_ds.tasks.TASKS`."""
    layout: str
    """Name of the layout, for people."""
    train: dict[str, Any]
    """Source of the training data, keys as in the YAML file."""
    test: dict[str, Any] | None = None
    """Source of the test data; None: the training data has to be split."""
    classes: list[str] | None = None
    """Class names that the files do not hold."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, one sentence each."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the head that follow from the data."""

    @property
    def images(self) -> tuple[str, str] | None:
        """Where the train and test images are ("": none): folders, or tar files; None for other formats."""
        if self.train["format"] == "webdataset":
            return str(self.train["shards"]), str((self.test or {"shards": ""})["shards"])
        parts = self.train, self.test or {"images": ""}
        if any(source.get("format", self.train["format"]) not in _WITH_IMAGES for source in parts):
            return None
        return parts[0]["images"], parts[1]["images"]


def choose_parts(parts: Mapping[str | None, T]) -> tuple[T, T | None, list[str]]:
    """Return what to train on, what to test on, and notes about the choice.

    Args:
        parts: {"train", "val", "test" or None for data without such a name: anything}

    Example:
        >>> choose_parts({"train": 1, "val": 2, "test": 3})[:2], choose_parts({None: 4})
        ((1, 2), (4, None, []))
    """
    notes = []
    order = [part for part in ("train", None, "val", "test") if part in parts]
    train = order[0]
    test = next((part for part in ("val", "test") if part in parts and part != train), None)
    if train != "train" and train is not None:
        notes.append(f"there is no train part; '{train}' is trained on")
    if None in parts and train != None:  # noqa: E711
        notes.append("data that is neither called train nor val nor test is not used")
    if test == "val" and "test" in parts:
        notes.append("val is evaluated on during training; the test part is not used, keep it for a last evaluation")
    return parts[train], None if test is None else parts[test], notes
