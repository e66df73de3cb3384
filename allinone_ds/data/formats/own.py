"""Data from a dataset class of one's own, named in the run's file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from allinone_ds.data.base import Problem, SampleDataset, SourceConfig
from allinone_ds.data.inspection.samples import fault_of
from allinone_ds.errors import AllInOneError, BrokenSample, ConfigError, DataError


class OwnSource(SourceConfig):
    """A subclass of `allinone_ds.data.SampleDataset` in a module on PYTHONPATH.

    Example:
        >>> source = OwnSource(format="class", dataset="mydata.rooms:Rooms", options={"split": "train"})
        >>> source.options
        {'split': 'train'}
    """

    format: Literal["class"]
    dataset: str
    """"module:Class". It is called with `root`, the Path of data_root, and with the options."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the class."""

    @field_validator("dataset")
    @classmethod
    def _is_name(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ConfigError(f"dataset = '{value}': write 'module:Class', for example 'mydata.rooms:Rooms'")
        return value

    def open(self, root: Path, classes: Sequence[str] | None = None) -> SampleDataset:
        module, _, name = self.dataset.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise DataError(f"dataset '{self.dataset}': {error}; is the folder of the module on PYTHONPATH?") from error
        if not (isinstance(cls, type) and issubclass(cls, SampleDataset)):
            raise DataError(f"dataset '{self.dataset}' is no subclass of allinone_ds.data.SampleDataset")
        make: Any = cls
        try:
            dataset: SampleDataset = make(root, **self.options)
        except TypeError as error:
            raise DataError(
                f"dataset '{self.dataset}': {error}; its __init__ takes root, the folder data_root, and the options"
            ) from error
        except AllInOneError:
            raise
        except Exception as error:  # the class is the user's own
            raise DataError(f"dataset '{self.dataset}': its __init__ raised {type(error).__name__}: {error}") from error
        self._check(dataset)
        if isinstance(classes, dict):
            given, own = classes, dict(getattr(dataset, "classes_of", {}))
        else:
            given, own = {"": classes}, {"": dataset.classes}
        for task, names in given.items():
            if names is not None and list(names) != list(own.get(task, names)):
                where = f"classes_of['{task}']" if task else "classes"
                raise DataError(
                    f"dataset '{self.dataset}': {where} is {own[task]}, those of the task or of the train set are "
                    f"{list(names)}; return them in this order"
                )
        dataset.structural = [*dataset.structural, *first_fault(dataset)]
        return dataset

    def _check(self, dataset: Any) -> None:
        """Raise a `DataError` unless a dataset has the attributes and the length that every dataset has."""
        of_group = {"kinds": dict, "classes_of": dict}
        needed = of_group if getattr(dataset, "kind", None) == "joint" else {"kind": str, "classes": list}
        for name, kind in needed.items():
            found = getattr(dataset, name, None)
            if not isinstance(found, kind):
                raise DataError(f"dataset '{self.dataset}': its {name} is {found!r}; set it to a {kind.__name__}, see "
                                "allinone_ds.data.SampleDataset")  # fmt: skip
        try:
            len(dataset)
        except Exception as error:
            raise DataError(f"dataset '{self.dataset}': __len__ raised {type(error).__name__}: {error}") from error


def first_fault(dataset: SampleDataset) -> list[Problem]:
    """Return what the first sample of a dataset lacks, in a list; empty if it lacks nothing or cannot be read."""
    if not len(dataset):
        return []
    try:
        sample = dataset[0]
    except BrokenSample:  # the check of the data files reports it, a run skips it
        return []
    except Exception as error:  # the class is the user's own
        return [Problem(f"{dataset.name}#0", f"reading it raised {type(error).__name__}: {error}")]
    fault = fault_of(dataset, sample)
    return [] if fault is None else [Problem(f"{dataset.name}#0", fault)]
