"""Tables of what an evaluation found for each class: in HTML for the report, and for the terminal. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from allinone_ds.reporting.html.page import table
from allinone_ds.reporting.run_history import Run

ROWS = 40
"""Classes that a table lists; of more, those with the lowest values."""
MATRIX = 25
"""Rows up to which a confusion matrix is shown as a whole."""


def class_sections(runs: Sequence[Run]) -> str:
    """Return the HTML of the tables per class, empty if no run has any.

    Of one run every column is shown, and which classes are confused; of several the first column of each, side by side.
    """
    parts = []
    for task in dict.fromkeys(task for run in runs for task in run.details):
        found = [run.details.get(task, {}) for run in runs]
        if not any("per_class" in details for details in found):
            continue
        parts.append(f"<h3>{escape(task)}</h3>")
        if len(runs) == 1:
            parts += [_columns(found[0]), _confusion(found[0])]
        else:
            parts.append(_beside(found, [run.label for run in runs]))
    return "<h2>Classes</h2>" + "".join(parts) if parts else ""


def class_tables(details: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Yield for every task tables of its classes, of those confused most often, and of its images with low scores.

    Args:
        details: task -> details.
    """
    for task, found in details.items():
        if "per_class" in found:
            shown, note = _order(found)
            columns = list(found["per_class"])
            result = _table(f"{task}: classes{note}", ["class"], columns)
            for place in shown:
                result.add_row(found["classes"][place], *(_text(found["per_class"][name][place]) for name in columns))
            yield result
        if found.get("confused"):
            pairs = _table(f"{task}: confused most often", ["true", "predicted"], ["times"])
            for true, predicted, count in found["confused"][:5]:
                pairs.add_row(true, predicted, str(count))
            yield pairs
        if found.get("worst"):
            images = _table(f"{task}: lowest scores", ["image"], ["score"])
            for image in found["worst"][:5]:
                images.add_row(image["path"], _text(image["score"]))
            yield images


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in left:
        result.add_column(name)
    for name in right:
        result.add_column(name, justify="right")
    return result


def _order(found: Mapping[str, Any]) -> tuple[list[int], str]:
    """Return the positions of the classes to list, and what to say if these are not all."""
    places = list(range(len(found["classes"])))
    if len(places) <= ROWS:
        return places, ""
    name, column = next(iter(found["per_class"].items()))
    places = sorted((place for place in places if column[place] is not None), key=lambda place: column[place])
    return places[:ROWS], f", the {ROWS} of {len(column)} with the lowest {name}; metrics.json has all"


def _columns(found: Mapping[str, Any]) -> str:
    shown, note = _order(found)
    columns = found["per_class"]
    rows = [[found["classes"][place], *(_text(values[place]) for values in columns.values())] for place in shown]
    said = f'<p class="note">{escape(note[2:])}</p>' if note else ""
    return said + table(["class", *columns], rows)


def _beside(found: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    first = next(details for details in found if "per_class" in details)
    name = next(iter(first["per_class"]))
    values = [dict(zip(d.get("classes", ()), d.get("per_class", {}).get(name, ()), strict=True)) for d in found]
    shown, note = _order(first)
    rows = [[first["classes"][p], *(_text(of_run.get(first["classes"][p])) for of_run in values)] for p in shown]
    said = f'<p class="note">{escape(name)} of each class{escape(note)}</p>'
    return said + table(["class", *labels], rows)


def _confusion(found: Mapping[str, Any]) -> str:
    """Return the confusion matrix, or the most frequent confusions of many classes."""
    counts, names = found.get("confusion"), found.get("confusion_names", [])
    if counts is None or len(names) > MATRIX:
        if not found.get("confused"):
            return ""
        rows = [[true, predicted, str(count)] for true, predicted, count in found["confused"]]
        return "<h4>Confused most often</h4>" + table(["true", "predicted", "times"], rows)
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    body = []
    for name, row in zip(names, counts, strict=True):
        total = sum(row)
        cells = "".join(
            f'<td class="number" style="background: rgba(38, 100, 200, {0.6 * count / max(total, 1):.2f})"'
            f' title="{count} of {total}">{_share(count, total)}</td>'
            for count in row
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        "<h4>Confusion matrix</h4>"
        '<p class="note">Rows are the truth, columns the predictions; each row in percent of its total.</p>'
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if count else ""


def _text(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
