"""The files below a folder, listed once."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from allinone_ds.data.formats.common.listing import is_image

Part = Literal["train", "val", "test"]

_PART_NAMES: dict[Part, frozenset[str]] = {
    "train": frozenset({"train", "training", "trn", "trainval"}),
    "val": frozenset({"val", "valid", "validation", "dev", "eval"}),
    "test": frozenset({"test", "testing", "tst"}),
}


class FileTree:
    """All files below a folder, without hidden files and folders; a link that leads back is not followed again.

    Args:
        root: the folder.
        name: the folder relative to `data_root`, "" if they are the same.

    Attributes:
        files: paths relative to `root`, sorted.
        remarks: why files that look like data were not used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "a").mkdir()
        ...     Path(folder, "a", "1.png").touch()
        ...     tree = FileTree(Path(folder), "pets")
        >>> tree.files, tree.images_in("a"), tree.reference("a")
        (['a/1.png'], ['1.png'], 'pets/a')
    """

    def __init__(self, root: Path, name: str = "") -> None:
        self.root = root
        self.name = name
        self.files: list[str] = []
        self.remarks: list[str] = []
        self._names: dict[str, list[str]] = defaultdict(list)  # {folder: names of its files}
        self._folders: dict[str, list[str]] = defaultdict(list)  # {folder: names of its folders}
        visited: set[str] = set()
        for current, folders, names in os.walk(root, followlinks=True):
            place = os.path.relpath(current, root)
            place = "" if place == "." else place
            folders[:] = sorted(
                f for f in folders if f[0] not in "._" and os.path.realpath(os.path.join(current, f)) not in visited
            )
            visited.update(os.path.realpath(os.path.join(current, f)) for f in folders)
            self._folders[place] = list(folders)
            self._names[place] = sorted(name for name in names if not name.startswith("."))
            self.files += [os.path.join(place, name) for name in self._names[place]]
        self.files.sort()
        self.known = frozenset(self.files)

    def reference(self, path: str) -> str:
        """Return a path below the tree as the YAML file gives it, relative to `data_root`."""
        return os.path.normpath(os.path.join(self.name, path))

    def folders(self) -> list[str]:
        """Return all folders that contain files, "" for the root."""
        return sorted(folder for folder, names in self._names.items() if names)

    def folders_in(self, folder: str) -> list[str]:
        """Return the names of the folders directly inside a folder."""
        return self._folders.get(folder, [])

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly inside a folder."""
        return self._names.get(folder, [])

    def images_in(self, folder: str) -> list[str]:
        """Return the names of the images directly inside a folder."""
        return [name for name in self.names_in(folder) if is_image(name)]

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Return the files whose names end in one of the suffixes, in any case."""
        return [file for file in self.files if file.lower().endswith(suffixes)]

    def suffixes(self) -> str:
        """Return the number of files by suffix, the most frequent first."""
        counts = Counter(os.path.splitext(file)[1].lower() or "(no suffix)" for file in self.files)
        return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(12)) or "no files"


def part_of(path: str) -> Part | None:
    """Return which part of a data set the names in a path stand for, the last one that stands for any.

    Example:
        >>> part_of("annotations/instances_train2017.json"), part_of("valid/images"), part_of("crowd.json")
        ('train', 'val', None)
    """
    for component in reversed(path.split(os.sep)):
        words = set(re.findall("[a-z]+", component.lower()))
        for part, names in _PART_NAMES.items():
            if words & names:
                return part
    return None


def common_folder(folders: Iterable[str]) -> str:
    """Return the deepest folder that contains all folders; they are relative, and "" is the root."""
    return os.path.commonpath([os.path.join("/", folder) for folder in folders])[1:]


def nearness(folder: str, other: str) -> int:
    """Return how many folders the paths of two folders share, from the root on.

    Example:
        >>> nearness("a/images", "a/labels"), nearness("a/images", "b")
        (1, 0)
    """
    return len([name for name in common_folder([folder, other]).split(os.sep) if name])
