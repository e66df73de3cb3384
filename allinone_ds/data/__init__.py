"""Data: readers of standard formats, augmentation, the schedule of samples, loaders, and a full check.

Names load on first use: making demo data needs no torch, and a command line that starts in a second is worth it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "augment": (
        "AugmentConfig",
        "Branch",
    ),
    "base": (
        "BrokenSample",
        "DataError",
        "Problem",
        "Sample",
        "SampleDataset",
    ),
    "check": ("check_sources",),
    "classified": (
        "ClassFoldersSource",
        "ClassifiedDataset",
        "ImageListSource",
    ),
    "coco": (
        "CocoDataset",
        "CocoSource",
    ),
    "hub": (
        "Columns",
        "DatasetsSource",
        "HubDataset",
    ),
    "images": (
        "read_image",
        "read_label_map",
    ),
    "label_maps": (
        "IGNORE",
        "LabelMapsDataset",
        "LabelMapsSource",
    ),
    "loader": (
        "CachedDataset",
        "EvalBatch",
        "FurtherSamples",
        "StepBatch",
        "TaskData",
        "eval_loader",
        "train_loader",
    ),
    "schedule": (
        "Draw",
        "Schedule",
    ),
    "sources": (
        "Source",
        "open_source",
    ),
    "transforms": (
        "SampleTransform",
        "eval_transform",
        "normalize",
        "stack_images",
        "stack_pixels",
        "train_transform",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
