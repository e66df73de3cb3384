"""Classification from an image list: a text file with `file class-id` per line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from allinone_ds.data.base import (
    ClassNames,
    Problem,
    SourceConfig,
    match_classes,
    need_folder,
    read_classes,
    read_text,
)
from allinone_ds.data.formats.classified_files import ClassifiedDataset
from allinone_ds.data.images import compare_files


class ImageListSource(SourceConfig):
    """A text file with `file class-id` a line."""

    format: Literal["image_list"]
    images: str
    """Folder that the list's files are relative to."""
    list: str
    """The text file. Empty lines and lines that start with # are passed over."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name a line; without it the ids are the names."""
    first_id: int = Field(0, ge=0)
    """Id of the first class in the list: 1 where it counts from 1."""


def open_image_list(
    source: ImageListSource, root: Path, classes: list[str] | None = None, strict: bool = True
) -> ClassifiedDataset:
    """Opens an image list.

    Args:
        source: folder, list and class names.
        root: what relative paths start at.
        classes: names of the train set, to give this set's classes the same places.
        strict: raise a `DataError` for structural faults instead of only keeping them in `structural`.

    Raises:
        DataError: always for a missing list; in strict mode also for missing files, lines that are not `file
            class-id`, ids out of range, or an empty list.
    """
    file = root / source.list
    folder = root / source.images
    need_folder(folder, "images")
    names = read_classes(source.classes, root)
    structural: list[Problem] = []
    files: list[str] = []
    ids: list[int] = []
    allowed = len(names) if names is not None else len(classes) if classes is not None else None
    first = source.first_id
    hint = f"ids count from first_id, which is {first}"
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.rsplit(None, 1)
        if len(parts) < 2 or not re.fullmatch("-?[0-9]+", parts[1]):
            structural.append(Problem(str(file), f"line {number}: {line.strip()!r} must be `file class-id`"))
            continue
        identity = int(parts[1])
        if identity < first or (allowed is not None and identity >= first + allowed):
            limits = f"be {first} or more" if allowed is None else f"lie in {first}..{first + allowed - 1}"
            structural.append(Problem(str(file), f"line {number}: class id {identity} must {limits} ({hint})"))
            continue
        files.append(parts[0].strip())
        ids.append(identity - first)
    if names is None and classes is None:
        names = [str(first + i) for i in range(max(ids, default=0) + 1)]
        unused = [names[i] for i in sorted(set(range(len(names))) - set(ids))]
        if unused and ids:
            reason = f"no image has class id {', '.join(unused[:5])}; {hint}; if that is meant, give 'classes'"
            structural.append(Problem(str(file), reason, "warning"))
    if names is not None:
        places = match_classes(str(file), names, classes)
        ids = [places[i] for i in ids]
    structural += compare_files(folder, files)
    final = classes if classes is not None else names
    return ClassifiedDataset(str(file), folder, files, ids, list(final or []), structural, strict)
