"""From `format: ...` in a config to a dataset."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, WrapValidator

from allinone_ds.data import formats
from allinone_ds.data.base import SampleDataset, SourceConfig, raise_problems, size_problems
from allinone_ds.strict import did_you_mean

SOURCE_CLASSES: tuple[type[SourceConfig], ...] = tuple(getattr(formats, name) for name in formats.__all__)
"""The source class of every format."""


def source_type(classes: Sequence[type[SourceConfig]]) -> Any:
    """Return the type of a config's source: the class whose `format` the config gives.

    Args:
        classes: the source classes to choose from.
    """
    names = [get_args(source_class.model_fields["format"].annotation)[0] for source_class in classes]

    def refuse_unknown(value: Any) -> Any:
        """Name the nearest format before pydantic looks for the fields of one."""
        if isinstance(value, dict) and value.get("format") not in names:
            found = value.get("format")
            raise ValueError(f"format is {found!r}; {did_you_mean(str(found), names)}")
        return value

    union: Any = Union[tuple(classes)]  # noqa: UP007
    return Annotated[Annotated[union, Field(discriminator="format")], BeforeValidator(refuse_unknown)]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Look for no unreachable objects inside this block: among those of a million annotations it takes seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _one_or_several(value: Any, handler: Any) -> Any:
    """Validate a list of sources as a list and all else as one source, so that messages name only what was meant."""
    expected: Any = Annotated[list[Source], Field(min_length=1)] if isinstance(value, list) else Source
    return TypeAdapter(expected).validate_python(value)


if TYPE_CHECKING:
    Source = SourceConfig
    Sources = SourceConfig | list[SourceConfig]
else:
    Source = source_type(SOURCE_CLASSES)
    """Where the samples of a task come from: one of the source classes, selected by `format`."""
    Sources = Annotated[Union[Source, list[Source]], WrapValidator(_one_or_several)]  # noqa: UP007
    """One source, or a list of sources whose samples are concatenated."""


def open_source(
    source: Source, root: Path | str, classes: list[str] | dict[str, list[str]] | None = None, strict: bool = True
) -> SampleDataset:
    """Open the dataset that a config describes.

    Args:
        source: an instance of a source class.
        root: folder that relative paths start at (`data_root`).
        classes: class names of the train set. Give them for a test set: its labels then follow the train set's order,
            even if it lacks some of the classes. A source without class names of its own uses them in this order. For
            a joint group: task -> class names.
        strict: raise the faults that show without decoding an image. False keeps them in the dataset's `structural`,
            for a complete check.

    Raises:
        DataError: the dataset cannot be opened; if `strict`, also for missing files, annotations that cannot be used,
            and a number of samples or classes other than `expect` gives.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from allinone_ds.data import ClassFoldersSource
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         Path(root, name).mkdir()
        ...         Image.new("RGB", (6, 4)).save(Path(root, name, "1.png"))
        ...     dataset = open_source(ClassFoldersSource(format="class_folders", images="."), root)
        ...     dataset.classes, [dataset[i]["label"] for i in range(len(dataset))]
        (['cat', 'dog'], [0, 1])
    """
    if not isinstance(source, SourceConfig):
        allowed = ", ".join(sorted(source_class.__name__ for source_class in SOURCE_CLASSES))
        raise TypeError(f"source is a {type(source).__name__}; give an instance of a source class ({allowed})")
    with _without_collection():
        dataset = source.open(Path(root), classes)  # type: ignore[arg-type]
    dataset.opened_from = source, Path(root)
    dataset.structural = [*dataset.structural, *size_problems(dataset, source.expect)]
    if strict:
        raise_problems(dataset.name, dataset.structural)
    return dataset
