"""Export of trained models: folders that load without the run, model cards and ONNX graphs.

May import `evaluation`, `run_config`, `run_folder` and the layers below them.
"""

from allinone_ds._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "folders": ["export_run"],
        "loading": ["load"],
    },
)
