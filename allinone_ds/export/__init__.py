"""Leaving a run: folders that load without it, model cards, ONNX graphs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folders import export_run
    from .loading import load

__all__ = ["export_run", "load"]

_HOME_OF = {"export_run": "folders", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Public names load on first use, like those of the other rooms."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'allinone_ds.export' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
