"""Readers of the data formats: one file per format, with its source class, and what the readers share.

May import `data.base` and `data.images`.
"""

from allinone_ds._lazy import lazy_names

# A format is registered by one line: its file, and the source class in it. `data.sources` reads the list.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "box_table": ["BoxTableSource"],
        "class_folders": ["ClassFoldersSource"],
        "coco": ["CocoSource"],
        "rows.hugging_face": ["DatasetsSource"],
        "rows.webdataset": ["WebDatasetSource"],
        "maps.dense_maps": ["DenseMapsSource"],
        "image_list": ["ImageListSource"],
        "image_table": ["ImageTableSource"],
        "label_maps": ["LabelMapsSource"],
        "own": ["OwnSource"],
        "script": ["ScriptSource"],
        "voc": ["VocSource"],
        "yolo": ["YoloSource"],
    },
)
