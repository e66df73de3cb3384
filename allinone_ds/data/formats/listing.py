"""Which files and folders exist, compared with those that a config and its annotations name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from allinone_ds.data.base import Problem
from allinone_ds.data.images import IMAGE_SUFFIXES, MISSING_FILE
from allinone_ds.errors import DataError


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: the file is missing, not readable or not text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: file is missing; correct the path (relative paths start at data_root)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from None


def require_folder(folder: Path, field: str) -> None:
    """Raise a `DataError` that names the config's `field` if `folder` is not a folder."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise DataError(f"{folder}: '{field}' must be a folder, {found}; correct '{field}' or data_root")


def check_listed_files(root: Path, listed: Sequence[str]) -> list[Problem]:
    """Compare the files that annotations list with those on disk.

    Every folder is listed once, which takes far less time than a query per file.

    Args:
        root: folder that `listed` is relative to.
        listed: file names, with sub-folders if there are any.

    Returns:
        An error per missing file, a warning per repeated file, and one warning for all images that are not listed.
    """
    unique: dict[str, None] = {}  # a set that keeps the order
    problems: list[Problem] = []
    for file in listed:
        if file in unique:
            problems.append(Problem(str(root / file), "is listed more than once; keep one entry", "warning"))
        unique[file] = None
    on_disk: set[str] = set()
    for folder in {os.path.dirname(file) for file in unique}:
        on_disk.update(os.path.normpath(os.path.join(folder, name)) for name in list_files(root / folder))
    normalized = {os.path.normpath(file) for file in unique}
    problems += [Problem(str(root / f), MISSING_FILE) for f in unique if os.path.normpath(f) not in on_disk]
    return problems + unused_images(root, [f for f in on_disk - normalized if is_image(f)], "in no annotation")


def unused_images(root: Path, files: Sequence[str], why: str) -> list[Problem]:
    """Return one warning that images below `root` are not used, or an empty list if there are none."""
    if not files:
        return []
    shown = ", ".join(sorted(files)[:3]) + (", ..." if len(files) > 3 else "")
    return [Problem(str(root), f"images {why}, not used: {len(files)} ({shown})", "warning")]


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder, an empty list if the folder does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except OSError:
        return []


def walk_images(folder: Path) -> list[str]:
    """Return all images below a folder, relative to it and sorted, without hidden folders (.ipynb_checkpoints)."""
    found = []
    for current, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(current, name), folder) for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image and is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")
