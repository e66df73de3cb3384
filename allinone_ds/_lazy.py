"""Public names of a package that are imported on first use, so that importing the package stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """Return the module-level `__getattr__` and `__all__` of a package whose public names are imported on first use.

    Args:
        package: `__name__` of the package.
        modules: module, relative to the package -> public names that it defines.

    Example:
        >>> __getattr__, __all__ = lazy_names("allinone_ds.export", {"loading": ("load",)})
        >>> __all__
        ['load']
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module = module_of[name]
        path = module if module.startswith(".") else f".{module}"
        return getattr(importlib.import_module(path, package), name)

    return load, sorted(module_of)
