"""Readers of standard data formats, augmentation, the schedule of samples, the loaders, and the check of all data.

May import only `strict`, `errors` and `_lazy` of the package.
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
        "base": ["IGNORE", "Part", "Problem", "Sample", "SampleDataset"],
        "..errors": ["BrokenSample", "DataError"],
        "loading.cache": ["CachedDataset"],
        "check": ["check_sources"],
        "combination": ["CombinedDataset", "CombinedSource", "Split", "combine"],
        "formats.box_table": ["BoxTableSource"],
        "formats.class_folders": ["ClassFoldersSource"],
        "formats.common.classified_files": ["ClassifiedDataset"],
        "formats.coco": ["CocoDataset", "CocoSource"],
        "formats.rows.columns": ["Columns"],
        "formats.rows.dataset": ["RowsDataset"],
        "formats.rows.hugging_face": ["DatasetsSource"],
        "formats.rows.webdataset": ["WebDatasetSource"],
        "formats.maps.dense_maps": ["DenseMapsDataset", "DenseMapsSource"],
        "augmentation.objects": ["Points"],
        "dense_maps": ["DenseMap", "EdgeMap", "NormalMap"],
        "formats.image_list": ["ImageListSource"],
        "formats.image_table": ["ImageTableSource"],
        "formats.label_maps": ["LabelMapsDataset", "LabelMapsSource"],
        "formats.own": ["OwnSource"],
        "formats.voc": ["VocSource"],
        "formats.yolo": ["YoloDataset", "YoloSource"],
        "loading.further_samples": ["FurtherSamples"],
        "joint.dataset": ["JointDataset"],
        "joint.sources": ["PairedSource"],
        "images": ["read_image", "read_label_map"],
        "loading.task_data": ["Joint", "TaskData"],
        "loading.loader": [
            "EvalBatch",
            "StepBatch",
            "eval_loader",
            "train_loader",
        ],
        "loading.schedule": ["Draw", "Schedule"],
        "sources": ["Source", "open_source"],
    },
)
