"""Tables: csv files with a column of images, and columns of labels or of boxes."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from allinone_ds.data.formats.common.class_names import sort_key
from allinone_ds.data.formats.common.listing import is_image, read_text
from allinone_ds.data.formats.common.tables import JSON_LINES, read_table
from allinone_ds.data.images import image_size
from allinone_ds.errors import DataError
from allinone_ds.init.file_tree import FileTree, part_of
from allinone_ds.init.found_task import FoundTask, choose_parts
from allinone_ds.init.layouts.classification import folder_of, lines_of
from allinone_ds.init.layouts.columns import attribute_columns, identity_column, number_columns

_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "species", "breed", "name", "y")
_BOX_LABELS = ("label", "class", "classname", "labelname", "category", "categoryname", "name", "classid", "labelid",
               "categoryid", "target", "object", "type")  # fmt: skip
_BOXES = {
    "xyxy": (("x1", "xmin", "left", "x0"), ("y1", "ymin", "top", "y0"), ("x2", "xmax", "right"),
             ("y2", "ymax", "bottom")),
    "cxcywh": (("xcenter", "xc", "cx", "centerx"), ("ycenter", "yc", "cy", "centery"), ("w", "width"),
               ("h", "height")),
    "xywh": (("x", "xmin", "x1", "left"), ("y", "ymin", "y1", "top"), ("w", "width"), ("h", "height")),
}  # fmt: skip
_BOX_COLUMN = ("bbox", "box", "boundingbox")
_HEADLESS = ["image", "x1", "y1", "x2", "y2", "label"]
_FLAGS = frozenset({"0", "1", "0.0", "1.0"})
_TRIED = 50  # images whose size is read

Rows = list[dict[str, str]]


def find(tree: FileTree) -> list[FoundTask]:
    """Return the tasks of csv files with a column of images, and columns of labels or of boxes, or nothing."""
    parts: dict[str, dict[str | None, dict[str, Any]]] = defaultdict(dict)
    notes: dict[str, list[str]] = defaultdict(list)
    unused = []
    for file in tree.with_suffix(".csv", ".tsv", ".jsonl", ".ndjson"):
        table = _read(tree, file)
        if table is None:
            continue
        rows, source = table
        labels = _labels(tree, rows, source)
        if not labels:
            unused.append(f"{file} lists images, but no column of it looks like classes, attributes or numbers")
        for kind, (options, said) in labels.items():
            if part_of(file) in parts[kind]:
                notes[kind].append(f"{file} is one more table of images; it is not used")
            else:
                notes[kind] += [f"{file}: {text}" for text in said if not parts[kind]]  # the same of every part
                parts[kind][part_of(file)] = {**source, **options}
    tasks = []
    for kind, of_kind in parts.items():
        train, test, chosen = choose_parts(of_kind)
        layout = "csv of boxes" if kind == "detection" else "table"
        tasks.append(FoundTask(kind, layout, train, test, notes=notes[kind] + chosen))
    if not tasks:
        tree.remarks += unused
        return []
    tasks[0].notes += unused
    return tasks


def _read(tree: FileTree, file: str) -> tuple[Rows, dict[str, Any]] | None:
    """Return the rows of a csv file that names images, and the source without its labels; None if it names none."""
    try:
        read_text(tree.root / file)
    except DataError as error:
        tree.remarks.append(str(error))
        return None
    text = lines_of(tree, file)
    header = text[0] if text else ""
    if file.lower().endswith(JSON_LINES):
        return _of_image_column(tree, file, _json_rows(tree, file), {})
    delimiter = max((",", ";", "\t"), key=header.count)
    try:
        first = next(csv.reader(text[:1], delimiter=delimiter), [])
        headless = len(first) == len(_HEADLESS) and is_image(first[0]) and all(map(_is_number, first[1:5]))
        reader = csv.DictReader(text, fieldnames=_HEADLESS if headless else None, delimiter=delimiter)
        rows = [{name: (row[name] or "").strip() for name in row if name is not None} for row in reader]
    except csv.Error:
        return None
    more: dict[str, Any] = {"columns": _HEADLESS} if headless else {}
    return _of_image_column(tree, file, rows, more | ({"delimiter": delimiter} if delimiter != "," else {}))


def _of_image_column(tree: FileTree, file: str, rows: Rows, more: dict[str, Any]) -> tuple[Rows, dict[str, Any]] | None:
    """Return the rows of a table and its source without its labels; None if no column names images."""
    image = _image_column(tree, rows, list(rows[0]) if rows else [], os.path.dirname(file))
    if image is None:
        named = [name for name in rows[0].values() if is_image(name)] if rows else []
        reason = f"names {named[0]}, which is not here" if named else "no column of it names images that are here"
        tree.remarks.append(f"{file}: {reason if rows else 'it has no row below the header'}")
        return None
    column, folder, suffix = image
    source: dict[str, Any] = {"format": "", "images": tree.reference(folder), "table": tree.reference(file)}
    return rows, {**source, "image_column": column, **more, **({"image_suffix": suffix} if suffix else {})}


def _json_rows(tree: FileTree, file: str) -> Rows:
    """Return the rows of a file with one json object per line, empty if it is none."""
    try:
        table = read_table(tree.root / file, ",", "")
    except DataError as error:
        tree.remarks.append(str(error))
        return []
    return [dict(zip(table.names, row, strict=True)) for row in table.rows]


def _labels(tree: FileTree, rows: Rows, source: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return {kind: (options of its source, notes)} of the labels in a table."""
    columns = [column for column in rows[0] if column != source["image_column"]]
    boxes = _box_columns(columns)
    if boxes:
        options, notes = _boxes(tree, rows, source, *boxes)
        return {"detection": ({"format": "box_table", **options}, notes)}
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    table = {"format": "image_table"}
    label, others, flags = _label_column(rows, columns)
    identity = identity_column(rows, columns)
    if identity is not None and (label is None or label == identity or label not in _LABEL_COLUMNS):
        note = f"column '{identity}' is taken for identities (retrieval); for classes set type and kind: classification"
        found["retrieval"] = {**table, "kind": "retrieval", "label_column": identity}, [note]
        label = None if label == identity else label
    if label is not None and (not found or label in _LABEL_COLUMNS):
        notes = [f"column '{label}' is taken for the class; others are {', '.join(others)}"] if others else []
        found["classification"] = {**table, "label_column": label}, notes
    names, absent = attribute_columns(rows, columns, [label, identity])
    one_hot = len(names) > 1 and all(sum(float(row[column] or 0) == 1 for column in names) == 1 for row in rows)
    if one_hot and absent == 0 and not found:
        return {"classification": ({**table, "label_columns": names}, [])}
    if len(names) > 1 or (names and absent):
        options = {**table, "kind": "attributes", "columns": names, **({"absent": -1} if absent else {})}
        meaning = "-1 is one that an image does not have" if absent else "0 is one that an image does not have"
        found["attributes"] = options, [f"{len(names)} columns are taken for attributes; {meaning}"]
    numbers = number_columns(rows, columns, [label, identity, *names])
    if numbers:
        note = f"{', '.join(numbers)} are taken for numbers to be predicted; remove those that are not"
        found["regression"] = {**table, "kind": "regression", "columns": numbers}, [note]
    return found


def _box_columns(columns: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return what the numbers of boxes are, and the columns that hold them; None if there are none."""
    plain = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in columns}
    plain |= {re.sub("^(bounding|bbox|box)+", "", name): column for name, column in plain.items()}
    for kind, numbers in _BOXES.items():
        found = [next((plain[name] for name in names if name in plain), None) for names in numbers]
        if all(found):
            return kind, [str(column) for column in found]
    for column in columns:
        if re.sub(r"[^a-z0-9]", "", column.lower()) in _BOX_COLUMN:
            return "", [column]
    return None


def _boxes(
    tree: FileTree, rows: Rows, source: dict[str, Any], kind: str, columns: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a source of boxes, and notes."""
    notes = []
    boxes = []
    for row in rows:
        words = re.findall(r"[-+.\deE]+", row[columns[0]]) if len(columns) == 1 else [row[c] for c in columns]
        words = [word.replace(",", ".") for word in words]
        if len(words) == 4 and all(map(_is_number, words)):
            boxes.append(
                (row[source["image_column"]] + source.get("image_suffix", ""), [float(word) for word in words])
            )
    fractions = bool(boxes) and all(max(numbers) <= 1 for _, numbers in boxes)
    if kind == "xyxy" and 2 * sum(x2 <= x1 or y2 <= y1 for _, (x1, y1, x2, y2) in boxes) > len(boxes):
        kind = "xywh"
        notes.append(
            f"'{columns[2]}' and '{columns[3]}' are taken for width and height, since they are too small for corners"
        )
    if not kind:
        ordered = all(x2 > x1 and y2 > y1 for _, (x1, y1, x2, y2) in boxes)
        kind = "xyxy" if ordered and _outside(tree, source, boxes) else "xywh"
        notes.append(f"the four numbers in '{columns[0]}' are taken for {kind}; look at them with `preview`")
    elif kind == "xywh" and fractions:
        notes.append("x and y are taken for the upper left corner; if they are the centre, set boxes: cxcywh")
    options: dict[str, Any] = {"box_columns": columns, "boxes": kind, "fractions": fractions}
    others = [c for c in rows[0] if c not in columns and c != source["image_column"]]
    plain = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in others}
    label = next((plain[name] for name in _BOX_LABELS if name in plain), None)
    options["label_column"] = label
    if label is None:
        notes.append("no column looks like classes: all boxes have one class")
    return options, notes


def _outside(tree: FileTree, source: dict[str, Any], boxes: Sequence[tuple[str, list[float]]]) -> bool:
    """Return whether boxes lie outside of their images if the last two numbers are their width and height."""
    for name, (x, y, w, h) in boxes[:: max(len(boxes) // _TRIED, 1)]:
        size = image_size(str(tree.root / os.path.relpath(source["images"], tree.name or ".") / name))
        if size is not None and (x + w > size[1] + 1 or y + h > size[0] + 1):
            return True
    return False


def _whole(values: Sequence[str]) -> bool:
    """Return whether all values are ids that were written as "3.0"."""
    return all(value.endswith(".0") for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _image_column(tree: FileTree, rows: Rows, columns: list[str], beside: str) -> tuple[str, str, str] | None:
    """Return (column, folder, suffix) of the column that names images."""
    for suffix in ("", ".jpg", ".png", ".jpeg"):
        for column in columns:
            names = list(dict.fromkeys(row[column] for row in rows))
            folder = folder_of(tree, names, beside, suffix) if all(is_image(n + suffix) for n in names[:20]) else None
            if folder is not None:
                return column, folder, suffix
    return None


def _label_column(rows: Rows, columns: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Return the column of the classes, other columns that could hold them, and the columns of only 0 and 1."""
    possible, flags = [], []
    for column in columns:
        values = [row[column] for row in rows]
        different = set(values)
        if different <= _FLAGS and column.lower() not in _LABEL_COLUMNS:
            flags.append(column)
            continue
        values = [value.removesuffix(".0") for value in values] if different <= _FLAGS else values
        different = set(values)
        numbers = all(re.fullmatch(r"-?\d*\.\d+", value) for value in values) and not _whole(values)
        if 1 < len(different) <= max(len(rows) // 2, 2) and not numbers:
            possible.append((column.lower() not in _LABEL_COLUMNS, sort_key(values) is int, column))
    if len(flags) == 1 and len({row[flags[0]] for row in rows}) == 2:
        possible.append((True, True, flags[0]))
    if not possible:
        return None, [], flags
    best = min(possible, key=lambda item: item[:2])
    return best[2], [column for _, _, column in possible if column != best[2]], flags
