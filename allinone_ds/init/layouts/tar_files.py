"""Tar files of the webdataset format: which tasks the members of their samples are for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import groupby, islice
from typing import Any

import numpy as np

from allinone_ds.data.formats.rows.columns import stored_map
from allinone_ds.data.formats.rows.tar_members import read_members
from allinone_ds.data.formats.rows.tar_table import IMAGE, IMAGES, TarTable
from allinone_ds.data.images import read_label_map
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.init.file_tree import FileTree, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.columns import attribute_columns
from allinone_ds.init.layouts.dense_maps import kind_of, options_of
from allinone_ds.init.layouts.hugging_face import LABEL_COLUMNS, Found, detection, numbered_classes, segmentation
from allinone_ds.init.layouts.names import find_names

_MEMBERS = 200  # of a tar file that are looked at to see whether it has samples
_EXAMINED = 8  # samples whose maps are read
_ATTRIBUTED = 200  # samples whose attributes are read
_MOST_IDS = 64  # different values in a small file, above which it is a picture
_WORDS = ("mask", "label", "annot", "seg", "truth", "target")
_MOST_NAMES = 1000  # different texts above which they are captions


def find(tree: FileTree) -> list[FoundTask]:
    """Return the tasks of the tar files in a folder, or nothing."""
    if packed := tree.with_suffix(".tar.gz", ".tgz", ".tar.zst", ".tar.xz"):
        tree.remarks.append(f"{packed[0]} is compressed; tar files are read if they are not, so unpack them to .tar")
    shards: dict[str | None, list[str]] = defaultdict(list)
    for file in tree.with_suffix(".tar"):
        shards[part_of(file)].append(file)
    usable = {part: files for part, files in shards.items() if _has_samples(tree, files[0])}
    if not usable:
        return []
    train_files, _, notes = choose_parts(usable)
    try:
        table = TarTable([tree.root / file for file in train_files])
        found = _found(table)
    except (DataError, BrokenSample) as error:
        tree.remarks.append(str(error))
        return []
    if not found:
        columns = ", ".join(name for name in table.features if name != IMAGE)
        tree.remarks.append(f"{train_files[0]} and other tar files are read, but their columns ({columns}) fit no task")
        return []
    sources = {part: {"format": "webdataset", "shards": _patterns(tree, files)} for part, files in usable.items()}
    train, test, _ = choose_parts(sources)
    tasks = []
    for kind, options, classes, more in found:
        if classes and classes[0].startswith("class_") and (names := find_names(tree, len(classes))) is not None:
            classes, more = names[1], [f"the class names are those in {names[0]}; check their order"]
        own = {"kind": kind, **options}
        both = {**train, **own}, None if test is None else {**test, **own}
        tasks.append(FoundTask(kind, "tar files", *both, classes, [*notes, *more]))
    return tasks


def _has_samples(tree: FileTree, file: str) -> bool:
    """Return whether most samples at the beginning of a tar file have an image and something beside it."""
    try:
        names = [member.name for member in islice(read_members(tree.root / file), _MEMBERS)]
    except (DataError, OSError) as error:
        tree.remarks.append(str(error))
        return False
    pairs = [(os.path.dirname(name), *os.path.basename(name).partition(".")[::2]) for name in names]
    groups = [[ending.lower() for *_, ending in group] for _, group in groupby(pairs, key=lambda pair: pair[:2])]
    with_image = [endings for endings in groups if {*endings} & {*IMAGES}]
    if with_image and 2 * sum(len(endings) > 1 for endings in with_image) <= len(groups):
        reason = "has images without a class, boxes or a map beside them, so there is nothing to learn from it"
        tree.remarks.append(f"{file} {reason}; unpack it if labels are elsewhere")
    return 2 * sum(len(endings) > 1 for endings in with_image) > len(groups)


def _patterns(tree: FileTree, files: Sequence[str]) -> Any:
    """Return what stands for some tar files as the YAML file gives it: a range of numbers, "*" or names."""
    patterns = []
    for folder, group in groupby(sorted(files), key=os.path.dirname):
        names = [os.path.basename(file) for file in group]
        others = [name for name in tree.names_in(folder) if name not in names]
        patterns += [tree.reference(os.path.join(folder, name)) for name in _short(names, others)]
    return patterns[0] if len(patterns) == 1 else patterns


def _short(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return a pattern for exactly these names in a folder with others, or the names.

    Example:
        >>> _short(["a-08.tar", "a-09.tar", "a-10.tar"], []), _short(["x.tar", "y.tar"], ["z.txt"])
        (['a-{08..10}.tar'], ['*.tar'])
    """
    matches = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in names]
    if len(names) > 1 and all(matches):
        parts = [match.groups() for match in matches if match]
        numbers = [int(number) for _, number, _ in parts]
        alike = len({(start, len(number), end) for start, number, end in parts}) == 1
        if alike and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            start, number, end = parts[0]
            return [f"{start}{{{number}..{parts[-1][1]}}}{end}"]
    start = os.path.commonprefix(list(names))
    pattern = f"{start}*.tar"
    if len(names) > 1 and "*" not in start and not any(fnmatchcase(name, pattern) for name in others):
        return [pattern]
    return list(names)


def _found(table: TarTable) -> list[Found]:
    """Return what can be learned from the columns of a table, at most one task per kind."""
    found = [_classes(table), detection(table, [IMAGE])]
    used = {IMAGE, *(next((e for e in IMAGES if row.get(e) is not None), "") for row in _rows(table, _EXAMINED))}
    maps = [n for n in table.features if n.rpartition(".")[2] in (*IMAGES, "npy") and n not in used]
    found += [_map(table, name) for name in maps]
    if not any(found):
        found.append(_attributes(table))
    by_kind: dict[str, Found] = {}
    for one in found:
        if one is not None:
            by_kind.setdefault(one[0], one)
    return list(by_kind.values())


def _classes(table: TarTable) -> Found | None:
    """Return the classes in `.cls`, in a key of `.json`, or in `.txt` if they are no captions."""
    for column in ("cls", *LABEL_COLUMNS, "txt"):
        if column not in table.features:
            continue
        values = [value for value in table[column] if value is not None]
        columns = {} if column == "cls" else {"columns": {"label": column}}
        if values and all(type(value) is int for value in values):
            return "classification", columns, *numbered_classes(values)
        if values and all(isinstance(value, str) for value in values):
            if column == "cls" or 1 < len(set(values)) <= min(_MOST_NAMES, len(values) / 2):
                return "classification", columns, None, []
    return None


def _map(table: TarTable, name: str) -> Found | None:
    """Return what the maps in a column are: of depth or the like if its name says so, else label maps of few values."""
    kind = kind_of(name)
    cells = [row[name] for row in _rows(table, _EXAMINED) if row.get(name) is not None]
    try:
        if kind is not None and cells:
            maps = [stored_map(cell, name) for cell in cells]
            options, notes = options_of(kind, maps, "disparit" in name)
            return kind, {"columns": {"map": name}, **options}, None, notes
        values = [len(np.unique(read_label_map(name, cell["bytes"]))) for cell in cells if isinstance(cell, dict)]
    except (BrokenSample, OSError):
        return None
    if not values or max(values) > (256 if any(word in name for word in _WORDS) else _MOST_IDS):
        return None
    return segmentation(table, IMAGE, name)


def _attributes(table: TarTable) -> Found | None:
    """Return the keys of `.json` that are 1, 0 or -1, if there are several."""
    names = [name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("int64", "bool")]
    some = _rows(table, _ATTRIBUTED)
    rows = [{name: "" if row.get(name) is None else str(int(row[name])) for name in names} for row in some]
    columns, absent = attribute_columns(rows, names, [])
    if len(columns) < 2:
        return None
    note = f"{len(columns)} keys of .json are taken for attributes; {absent} is one that an image does not have"
    options = {"columns": {"attributes": columns}, **({"absent": absent} if absent else {})}
    return "attributes", options, None, [note]


def _rows(table: TarTable, most: int) -> list[dict[str, Any]]:
    return [table[row] for row in range(min(len(table), most))]
