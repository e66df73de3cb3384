"""Classification from a text file with `file class-id` per line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from allinone_ds.data.base import Problem, SourceConfig
from allinone_ds.data.formats.common.class_names import ClassNames, match_classes, read_classes
from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
from allinone_ds.data.formats.common.listing import check_listed_files, read_text, require_folder
from allinone_ds.strict import PathText


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
    images: PathText
    """Folder that the files in the list are relative to."""
    list: PathText
    """The text file. Empty lines and lines that start with # are skipped."""
    classes: ClassNames | None = None
    """Class names in the order of the ids, or a text file with one name per line; null: those of the task, or the ids
    as names: those that occur, or with `expect.classes` every one from `first_id` to the largest."""
    first_id: int = Field(0, ge=0)
    """Id of the first class: 1 if the ids in the list start at 1."""

    def open(self, root: Path, classes: Sequence[str] | None = None) -> ClassifiedDataset:
        file = root / self.list
        folder = root / self.images
        require_folder(folder, "images")
        names = read_classes(self.classes, root)
        label_of: dict[int, int] | None = None  # label by id in the list; None: the labels follow from the ids
        if names is not None:
            matched = match_classes(str(file), names, classes)
            label_of = {self.first_id + i: label for i, label in matched.items()}
        elif classes is not None and all(re.fullmatch("[0-9]+", name) for name in classes):
            label_of = {int(name): label for label, name in enumerate(classes)}  # the train set's names are its ids
        elif classes is not None:
            label_of = {self.first_id + label: label for label in range(len(classes))}
        files, ids, structural = _read_lines(file, self.first_id, label_of)
        if label_of is None:
            if self.expect is not None and self.expect.classes is not None:
                label_of = {
                    self.first_id + i: i for i in range(max(ids, default=self.first_id - 1) + 1 - self.first_id)
                }
            else:
                label_of = {number: label for label, number in enumerate(sorted(set(ids)))}
                structural += _gaps(file, self.first_id, label_of)
            names = [str(number) for number in label_of]
        structural += check_listed_files(folder, files, ids)
        labels = [label_of[number] for number in ids]
        return ClassifiedDataset(str(file), folder, files, labels, [*(classes or names or ())], structural)


_FIRST_ID = "ids count from first_id, which is {}"


def _gaps(file: Path, first_id: int, label_of: Mapping[int, int]) -> list[Problem]:
    """Return a warning if ids between `first_id` and the largest one do not occur, or an empty list."""
    count = max(label_of, default=first_id - 1) + 1 - first_id - len(label_of)
    if not count:
        return []
    unused = islice((number for number in range(first_id, max(label_of)) if number not in label_of), 5)
    reason = (
        f"no image has class id {', '.join(map(str, unused))}{', ...' if count > 5 else ''} ({count} ids up to "
        f"{max(label_of)}); the {len(label_of)} ids that occur become classes 0..{len(label_of) - 1} in ascending "
        f"order; {_FIRST_ID.format(first_id)}; if classes without images are to be kept, set 'classes'"
    )
    return [Problem(str(file), reason, "warning")]


def _read_lines(
    file: Path, first_id: int, label_of: Mapping[int, int] | None
) -> tuple[list[str], list[int], list[Problem]]:
    """Return the files of a list, their class ids, and the faults of its lines.

    Args:
        file: the list.
        first_id: id of the first class.
        label_of: the allowed ids, as keys; None allows every id from `first_id`.
    """
    files: list[str] = []
    ids: list[int] = []
    problems: list[Problem] = []
    if label_of is None:
        allowed = f"be {first_id} or more ({_FIRST_ID.format(first_id)})"
    elif label_of and max(label_of) - min(label_of) + 1 == len(label_of):
        allowed = f"lie in {min(label_of)}..{max(label_of)} ({_FIRST_ID.format(first_id)})"
    else:
        allowed = f"be one of the {len(label_of)} ids of the train set"
    for number, line in enumerate(read_text(file, file_names=True).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.rsplit(None, 1)
        if len(parts) < 2 or not re.fullmatch("-?[0-9]+", parts[1]):
            problems.append(Problem(str(file), f"line {number}: {line.strip()!r} must be `file class-id`"))
            continue
        class_id = int(parts[1])
        if class_id < first_id if label_of is None else class_id not in label_of:
            problems.append(Problem(str(file), f"line {number}: class id {class_id} must {allowed}"))
            continue
        files.append(parts[0].strip())
        ids.append(class_id)
    return files, ids, problems
