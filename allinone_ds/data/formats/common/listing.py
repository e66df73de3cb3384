"""Which files and folders exist, compared with those that a config and its annotations name."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from allinone_ds.data.base import Problem
from allinone_ds.data.images import IMAGE_SUFFIXES, MISSING_FILE
from allinone_ds.errors import DataError

_TEXT_SUFFIXES = frozenset(".txt .json .jsonl .xml .csv .tsv .yaml .yml .md .html .log .db .ini .py .sh".split())
NUMPY_SUFFIX = ".npy"
_TEXT_FILES = frozenset(("LICENSE", "NOTICE", "README"))


def read_text(file: Path, file_names: bool = False) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if it begins with that encoding's mark.

    Args:
        file: the file.
        file_names: the text lists files, whose names may be no UTF-8: other bytes are kept as Python keeps them in the
            names of files (surrogate escapes).

    Raises:
        DataError: the file is missing, not readable or not text.
    """
    try:
        data = file.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig", "surrogateescape" if file_names else "strict")
    except FileNotFoundError:
        raise DataError(f"{file}: file is missing; correct the path (relative paths start at data_root)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}; save it as UTF-8") from None


def require_folder(folder: Path, field: str) -> None:
    """Raise a `DataError` that names the config's `field` if `folder` is not a folder."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise DataError(f"{folder}: '{field}' must be a folder, {found}; correct '{field}' or data_root")


def check_listed_files(root: Path, listed: Sequence[str], labels: Sequence[Hashable] | None = None) -> list[Problem]:
    """Compare the files that annotations list with those on disk.

    Every folder is listed once, which takes far less time than a query per file.

    Args:
        root: folder that `listed` is relative to.
        listed: file names, with sub-folders if there are any.
        labels: the label of each entry, to compare those of repeated files.

    Returns:
        An error per missing file, a warning per repeated file, and one warning for all images that are not listed.
    """
    unique = dict.fromkeys(listed)
    problems = _repeated(root, listed, labels) if len(unique) < len(listed) else []
    normalized = {file: os.path.normpath(file) for file in unique}
    on_disk: set[str] = set()
    for folder in {file[: file.rfind(os.sep) + 1] for file in normalized.values()}:
        on_disk.update(folder + name for name in list_files(root / folder))
    missing = [file for file, path in normalized.items() if path not in on_disk]
    problems += [Problem(str(root / file), MISSING_FILE) for file in missing]
    near = {_plain(file): file for file in on_disk} if missing else {}
    alike = [(file, near[_plain(file)]) for file in missing if _plain(file) in near]
    if alike:
        shown = ", ".join(f"{file}: {os.path.basename(other)}" for file, other in alike[:3])
        reason = (
            f"{len(alike)} of the missing files are there with another suffix, case or slash ({shown}); correct these"
        )
        problems.append(Problem(str(root), reason, "warning"))
    unused = on_disk.difference(normalized.values())
    return problems + unused_images(root, [f for f in unused if is_image(f)], "in no annotation")


def _repeated(root: Path, listed: Sequence[str], labels: Sequence[Hashable] | None) -> list[Problem]:
    """Return a warning for each entry of a file that is listed before."""
    first: dict[str, Hashable] = {}
    problems = []
    for file, label in zip(listed, labels or [None] * len(listed), strict=True):
        if file in first:
            what = "" if first[file] == label else f" with different labels ({first[file]}, {label})"
            problems.append(Problem(str(root / file), f"is listed more than once{what}; keep one entry", "warning"))
        first.setdefault(file, label)
    return problems


def _plain(file: str) -> str:
    """Return a name by which files that differ in their case, suffix or kind of slash are equal."""
    stem, suffix = os.path.splitext(os.path.normpath(file.replace("\\", "/")))
    return (stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix).lower()


def unused_images(root: Path, files: Sequence[str], why: str) -> list[Problem]:
    """Return one warning that images below `root` are not used, or an empty list if there are none."""
    if not files:
        return []
    shown = ", ".join(sorted(files)[:3]) + (", ..." if len(files) > 3 else "")
    return [Problem(str(root), f"images {why}, not used: {len(files)} ({shown})", "warning", unused=frozenset(files))]


def unused_by_both(train: Sequence[Problem], test: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of a train set and a test set in one folder, where each uses what the other does not.

    Args:
        train: `structural` of the train set.
        test: that of the test set. Of a folder that both warn of, only the train set's warning remains, with the images
            that neither uses.
    """
    left = {problem.file: problem.unused for problem in train if problem.unused}
    both = {problem.file: problem.unused & left[problem.file] for problem in test if problem.file in left}
    kept = []
    for problem in train:
        if problem.unused and problem.file in both:
            why = problem.reason.partition(", not used:")[0].removeprefix("images ")
            kept += unused_images(Path(problem.file), sorted(both[problem.file]), why)
        else:
            kept.append(problem)
    return kept, [problem for problem in test if not (problem.unused and problem.file in both)]


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder, an empty list if the folder does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except (OSError, ValueError):  # ValueError: the name holds a zero byte
        return []


def walk_files(folder: Path) -> list[str]:
    """Return all files below a folder, relative to it and sorted, without hidden folders (.ipynb_checkpoints).

    Links to folders are followed. Every folder is visited once, since links may lead in circles: under its own path if
    that lies below `folder`, else under that of the first link.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    folders = [""]  # relative to `folder`
    links: list[str] = []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder / current)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder / current) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder / current}: cannot be listed: {error.strerror}; make it readable") from None
        for entry in entries:
            path = os.path.join(current, entry.name)
            if not is_folder(entry):
                found.append(path)
            elif not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(path)
    return sorted(found)


def walk_images(folder: Path) -> list[str]:
    """Return the images among the files of `walk_files`."""
    return [file for file in walk_files(folder) if is_image(file)]


def walk_images_or_arrays(folder: Path) -> list[str]:
    """Return the images among the files of `walk_files`; of a folder without any, the numpy files."""
    files = walk_files(folder)
    arrays = (f for f in files if f.lower().endswith(NUMPY_SUFFIX) and not os.path.basename(f).startswith("."))
    return [file for file in files if is_image(file)] or list(arrays)


def unread_files(root: Path, files: Sequence[str]) -> list[Problem]:
    """Return one warning that files among the images below `root` are not read, or an empty list if there are none.

    Hidden files and files of text beside the images (annotations, notes) are not counted.
    """
    unread = [f for f in files if not is_image(f) and not _is_text(f)]
    if not unread:
        return []
    counts = Counter(os.path.splitext(file)[1] or "no suffix" for file in unread).most_common(5)
    suffixes = ", ".join(f"{count} with {suffix}" for suffix, count in counts)
    reason = (
        f"{len(unread)} of {len(files)} files are not read ({suffixes}; {unread[0]}); convert or rename images among "
        f"them, allowed suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}"
    )
    return [Problem(str(root), reason, "warning")]


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image and is not hidden."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and name[name.rfind(os.sep) + 1] != "."


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_text(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith(".") or os.path.splitext(base)[1].lower() in _TEXT_SUFFIXES or base in _TEXT_FILES
