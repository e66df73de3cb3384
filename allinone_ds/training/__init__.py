"""Training: arguments, trainer, evaluation, run folders and their pages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import AllInOneArguments
    from .config import RunConfig, load_config
    from .trainer import AllInOneTrainer

__all__ = ["AllInOneArguments", "AllInOneTrainer", "RunConfig", "load_config"]

_HOME_OF = {
    "AllInOneArguments": "arguments",
    "AllInOneTrainer": "trainer",
    "RunConfig": "config",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    """Public names load on first use: the command line needs only the quick files of this room."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'allinone_ds.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
