"""The examples in the docstrings of the package run, and every public class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import allinone_ds

NAMES = sorted(info.name for info in pkgutil.walk_packages(allinone_ds.__path__, "allinone_ds."))
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["allinone_ds", *NAMES])
def test_examples_of_docstrings_run(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for examples that write files
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert not failed, "see the output of doctest above"


def public_classes() -> dict[str, type]:
    """Return the classes in `__all__` of the packages, exceptions aside, by the qualified name of their definition."""
    packages = [importlib.import_module(name) for name in ["allinone_ds", *NAMES]]
    listed = [getattr(package, name) for package in packages if hasattr(package, "__path__")
              for name in getattr(package, "__all__", ())]  # fmt: skip
    return {f"{value.__module__}.{value.__qualname__}": value for value in listed
            if inspect.isclass(value) and not issubclass(value, BaseException)}  # fmt: skip


def test_every_public_class_has_an_example() -> None:
    missing = [name for name, cls in sorted(public_classes().items()) if "Example" not in (cls.__doc__ or "")]
    assert not missing, "add an `Example:` to the docstring of " + ", ".join(missing)
