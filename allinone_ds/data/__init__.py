"""Readers of standard formats, augmentation, the schedule of samples, loaders, and a full check of the data.

May import the modules at the bottom of the package only.
"""

from allinone_ds._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "augmentation.branches": ["AugmentConfig", "Branch"],
        "augmentation.transforms": [
            "SampleTransform",
            "eval_transform",
            "normalize",
            "stack_images",
            "stack_pixels",
            "train_transform",
        ],
        "base": ["IGNORE", "Problem", "Sample", "SampleDataset"],
        "..errors": ["BrokenSample", "DataError"],
        "check": ["check_sources"],
        "formats.class_folders": ["ClassFoldersSource"],
        "formats.classified_files": ["ClassifiedDataset"],
        "formats.coco": ["CocoDataset", "CocoSource"],
        "formats.hugging_face": ["Columns", "DatasetsSource", "HubDataset"],
        "formats.image_list": ["ImageListSource"],
        "formats.label_maps": ["LabelMapsDataset", "LabelMapsSource"],
        "images": ["read_image", "read_label_map"],
        "loader": [
            "CachedDataset",
            "EvalBatch",
            "FurtherSamples",
            "StepBatch",
            "TaskData",
            "eval_loader",
            "train_loader",
        ],
        "schedule": ["Draw", "Schedule"],
        "sources": ["Source", "open_source"],
    },
)
