"""Data: readers of standard formats, augmentation, the schedule of samples, loaders, and a full check."""

from allinone_ds.data.base import BrokenSample, DataError, Problem, Sample, SampleDataset
from allinone_ds.data.check import check_sources
from allinone_ds.data.classified import ClassFoldersSource, ClassifiedDataset, ImageListSource
from allinone_ds.data.coco import CocoDataset, CocoSource
from allinone_ds.data.hub import Columns, DatasetsSource, HubDataset
from allinone_ds.data.images import read_image, read_label_map
from allinone_ds.data.label_maps import IGNORE, LabelMapsDataset, LabelMapsSource
from allinone_ds.data.loader import CachedDataset, EvalBatch, StepBatch, TaskData, eval_loader, train_loader
from allinone_ds.data.schedule import Draw, Schedule
from allinone_ds.data.sources import Source, open_source
from allinone_ds.data.transforms import (
    SampleTransform,
    eval_transform,
    normalize,
    stack_images,
    train_transform,
)

__all__ = [
    "IGNORE",
    "BrokenSample",
    "CachedDataset",
    "ClassFoldersSource",
    "ClassifiedDataset",
    "CocoDataset",
    "CocoSource",
    "Columns",
    "DataError",
    "DatasetsSource",
    "Draw",
    "EvalBatch",
    "HubDataset",
    "ImageListSource",
    "LabelMapsDataset",
    "LabelMapsSource",
    "Problem",
    "Sample",
    "SampleDataset",
    "SampleTransform",
    "Schedule",
    "Source",
    "StepBatch",
    "TaskData",
    "check_sources",
    "eval_loader",
    "eval_transform",
    "normalize",
    "open_source",
    "read_image",
    "read_label_map",
    "stack_images",
    "train_loader",
    "train_transform",
]
