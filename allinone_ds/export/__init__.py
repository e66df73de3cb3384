"""Leaving a run: folders that load without it, model cards and ONNX graphs.

May import `evaluation`, `run_config`, `run_folder` and everything below them.
"""

from allinone_ds._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "folders": ["export_run"],
        "loading": ["load"],
    },
)
