"""Classification from a text file with `file class-id` per line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.classified_files import ClassifiedDataset
from allinone_ds.data.formats.listing import check_listed_files, read_text, require_folder


class ImageListSource(SourceConfig):
    """A text file with `file class-id` per line.

    Example:
        >>> import tempfile
        >>> source = ImageListSource(format="image_list", images=".", list="a.txt", first_id=1, classes=["old", "new"])
        >>> with tempfile.TemporaryDirectory() as root:
        ...     _ = Path(root, "a.txt").write_text("cars/1.jpg 1\\ncars/2.jpg 2\\n")
        ...     dataset = source.open(Path(root))
        >>> dataset.labels, len(dataset.structural)  # no image exists
        ([0, 1], 2)
    """

    format: Literal["image_list"]
    images: str
    """Folder that the files in the list are relative to."""
    list: str
    """The text file. Empty lines and lines that start with # are skipped."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; null: those of the task, or
    the ids as names."""
    first_id: int = Field(0, ge=0)
    """Id of the first class: 1 if the ids in the list start at 1."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        file = root / self.list
        folder = root / self.images
        require_folder(folder, "images")
        names = read_classes(self.classes, root)
        known = names if names is not None else classes
        files, ids, structural = _read_lines(file, self.first_id, None if known is None else len(known))
        if known is None:
            names = [str(self.first_id + i) for i in range(max(ids, default=0) + 1)]
            unused = [names[i] for i in sorted(set(range(len(names))) - set(ids))]
            if unused and ids:
                reason = (
                    f"no image has class id {', '.join(unused[:5])}; {_FIRST_ID.format(self.first_id)}; "
                    "if this is correct, set 'classes'"
                )
                structural.append(Problem(str(file), reason, "warning"))
        if names is not None:
            label_of = match_classes(str(file), names, classes)
            ids = [label_of[i] for i in ids]
        structural += check_listed_files(folder, files)
        return ClassifiedDataset(str(file), folder, files, ids, [*(classes or names or ())], structural)


_FIRST_ID = "ids count from first_id, which is {}"


def _read_lines(file: Path, first_id: int, classes: int | None) -> tuple[list[str], list[int], list[Problem]]:
    """Return the files of a list, their class ids counted from 0, and the faults of its lines.

    Args:
        file: the list.
        first_id: id of the first class.
        classes: number of classes; None allows every id from `first_id`.
    """
    files: list[str] = []
    ids: list[int] = []
    problems: list[Problem] = []
    allowed = f"be {first_id} or more" if classes is None else f"lie in {first_id}..{first_id + classes - 1}"
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.rsplit(None, 1)
        if len(parts) < 2 or not re.fullmatch("-?[0-9]+", parts[1]):
            problems.append(Problem(str(file), f"line {number}: {line.strip()!r} must be `file class-id`"))
            continue
        number_from_0 = int(parts[1]) - first_id
        if number_from_0 < 0 or (classes is not None and number_from_0 >= classes):
            reason = f"line {number}: class id {int(parts[1])} must {allowed} ({_FIRST_ID.format(first_id)})"
            problems.append(Problem(str(file), reason))
            continue
        files.append(parts[0].strip())
        ids.append(number_from_0)
    return files, ids, problems
