"""HTML pages about runs: report.html of one run or of several side by side, and predictions.html. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import yaml

from allinone_ds.evaluation.metrics import labelled_metrics
from allinone_ds.reporting.class_tables import class_sections
from allinone_ds.reporting.html.page import document, figure, image, table
from allinone_ds.reporting.html.transfer import transfer_section
from allinone_ds.reporting.plots import Lines, describe, evaluation_lines, series, svg
from allinone_ds.reporting.run_history import Run, read_run
from allinone_ds.reporting.text import clock
from allinone_ds.run_folder.names import PAGE_FILE, REPORT_FILE
from allinone_ds.strict import dotted_values

MAX_EVENTS = 50
"""Starts, stops and warnings listed per run, the latest ones."""
PICTURES_ALONE, PICTURES_BESIDE = 12, 4
"""Test images shown per task: for one run, and for each of several."""
PAIRS = 12
"""Pairs of tasks whose cosines are shown; of more, those with the lowest means."""
MANY_TASKS = 12
"""Tasks up to which several runs are compared by a plot of every quantity of each task; beyond, by loss and metric."""

_CONSTANTS = (
    "<p>A constant predictor gives every image the same answer, the best one for each metric: the most frequent class, "
    "a mean, one value everywhere, one box of the mean place.</p>"
)


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one or several runs: results, plots, predictions, last values and configurations.

    Args:
        folders: folders of the runs; a run may be in progress.
        output: the file to write; None is report.html in the first run's folder.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is not that of a run.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "log.jsonl").write_text('{"event": "log", "step": 1, "loss": 2.0, "loss/det": 2.0}')
        >>> "1, not ended" in write_report([folder]).read_text()
        True
    """
    runs = [read_run(folder) for folder in folders]
    _make_labels_distinct(runs)
    target = Path(output) if output is not None else runs[0].folder / REPORT_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.label for run in runs)}"
    sections = [
        _results(runs),
        transfer_section(runs),
        _differences(runs),
        _events(runs),
        _plots(runs),
        _last_values(runs),
    ]
    sections += [class_sections(runs), _predictions(runs)]
    target.write_text(document(title, [*sections, *(_configuration(run) for run in runs)]))
    return target


def write_predictions_page(folder: str | Path) -> Path:
    """Write predictions.html of a run: results and drawn predictions.

    Args:
        folder: the run's folder, with metrics.json and the pictures that `save_pictures` wrote.

    Returns:
        The file.
    """
    run = read_run(folder)
    target = run.folder / PAGE_FILE
    target.write_text(document(run.label, [_results([run]), _predictions([run])]))
    return target


def _make_labels_distinct(runs: Sequence[Run]) -> None:
    """Label runs of the same name with their folder's name, or with its path if these are the same too."""
    for label_of in (lambda run: run.folder.name, lambda run: str(run.folder)):
        labels = [run.label for run in runs]
        for run in runs:
            if labels.count(run.label) > 1:
                run.label = label_of(run)


# ---- sections ----


def _results(runs: Sequence[Run]) -> str:
    rows: dict[str, list[str]] = {
        "steps": [],
        "ranks": [],
        "training time": [],
        "peak memory of a rank, GiB": [],
        "images that could not be read": [],
    }
    for run in runs:
        last = run.history[-1]["step"] if run.history else 0
        rows["steps"].append(str(run.metrics.get("steps", f"{last}, not ended")))
        rows["ranks"].append(str(run.metrics.get("world_size", "")))
        rows["training time"].append(clock(run.metrics["train_runtime"]) if "train_runtime" in run.metrics else "")
        peaks = [entry["memory/peak_gib"] for entry in run.history if "memory/peak_gib" in entry]
        rows["peak memory of a rank, GiB"].append(f"{max(peaks):.2f}" if peaks else "")
        broken = [entry["broken_images"] for entry in run.history if "broken_images" in entry]
        rows["images that could not be read"].append(str(broken[-1]) if broken else "")
    metrics = [labelled_metrics(run.evaluated, run.tasks) for run in runs]
    names = dict.fromkeys(name for values in metrics for name in values if name != "score")
    for name in [*names, *(["score"] if any("score" in values for values in metrics) else [])]:
        label = "score (mean of main metrics)" if name == "score" else name
        rows[label] = [f"{values[name]:.4f}" if name in values else "" for values in metrics]
    constants = {f"{t}: {m}": f"{v:.4f}" for t, of_task in runs[0].constants.items() for m, v in of_task.items()}
    cells = [[name, *values, *([constants.get(name, "")] if constants else [])] for name, values in rows.items()]
    labels = [*(run.label for run in runs), *(["constant predictor"] if constants else [])]
    return "<h2>Results</h2>" + table(["", *labels], cells) + (_CONSTANTS if constants else "")


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    flat = [dotted_values(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = []
    for key in keys:
        values = [values.get(key, "(absent)") for values in flat]
        if any(value != values[0] for value in values[1:]) and key != "output_dir":
            rows.append([key, *map(str, values)])
    if not rows:
        return "<h2>Configuration differences</h2><p>None: the runs have the same configuration.</p>"
    return "<h2>Configuration differences</h2>" + table(["key", *(run.label for run in runs)], rows, code=True)


def _events(runs: Sequence[Run]) -> str:
    rows = [[run.label, str(step), text] for run in runs for step, text in run.events[-MAX_EVENTS:]]
    if not rows:
        return ""
    first = 0 if len(runs) > 1 else 1
    head = ["run", "step", "event"][first:]
    return "<h2>Starts, stops and warnings</h2>" + table(head, [row[first:] for row in rows])


def _plots(runs: Sequence[Run]) -> str:
    """For one run: a plot per quantity, a line per task. For several: a plot per quantity and task, a line per run."""
    quantities: list[tuple[str, Callable[[Run], Lines], bool, tuple[float, float] | None]] = [
        ("loss", lambda run: series(run.history, "loss/"), True, None),
        ("evaluation", lambda run: evaluation_lines(run.history, run.tasks), False, (0.0, 1.0)),
        ("seconds per step", lambda run: series(run.history, "seconds/"), False, None),
    ]
    many = len(runs) > 1 and max(len(run.tasks) for run in runs) > MANY_TASKS
    if not many:
        cosines, cosines_of = _cosines(runs)
        quantities[2:2] = [
            ("backbone gradient norm before balancing", _norms("/raw"), True, None),
            ("factor of the gradient", _norms("/scale"), True, None),
            ("backbone gradient norm after balancing", _norms("/scaled"), True, None),
            ("share of the squared norm of the update", _norms("/share"), False, (0.0, 1.0)),
            (cosines, cosines_of, False, (-1.0, 1.0)),
            ("images per second", lambda run: series(run.history, "images_per_second/"), False, None),
        ]
    images, most = [], 0
    for title, lines_of, log, limits in quantities:
        by_run = {run.label: lines_of(run) for run in runs}
        if len(runs) == 1:
            panels = {title: by_run[runs[0].label]}
        else:
            panels = {
                f"{title}: {label}": {run: lines[label] for run, lines in by_run.items() if label in lines}
                for label in dict.fromkeys(label for lines in by_run.values() for label in lines)
            }
        labels = [run.label for run in runs] if len(runs) > 1 else []
        for name, lines in panels.items():
            if any(len(steps) > 1 for steps, _ in lines.values()):  # a single point is in the tables
                picture = svg(lines, name, log, _limits(lines, limits) if limits else None, labels)
                most = max(most, len(lines))
                images.append(image("image/svg+xml", picture.encode(), describe(lines, name)))
    note = (
        f"Of more than {MANY_TASKS} tasks, several runs are compared by loss and main metric; the page of one run has "
        "the other plots."
    )
    said = f'<p class="note">{note}</p>' if many else ""
    kind = "plots many" if most > MANY_TASKS else "plots"  # larger ones, with readable names
    return f'<h2>Training</h2>{said}<div class="{kind}">{"".join(images)}</div>' if images else ""


def _norms(suffix: str) -> Callable[[Run], Lines]:
    return lambda run: series(run.history, "grad_norm/", suffix)


def _cosines(runs: Sequence[Run]) -> tuple[str, Callable[[Run], Lines]]:
    """Return the title of the plots of cosines, and what returns the lines of a run: those of the lowest means."""
    title, lines = "cosine of two tasks' backbone gradients", [series(run.history, "cosine/") for run in runs]
    values: dict[str, list[float]] = {}
    for name, (_, of_pair) in (line for of_run in lines for line in of_run.items()):
        values.setdefault(name, []).extend(value for value in of_pair if math.isfinite(value))
    if len(values) > PAIRS:
        title += f": the {PAIRS} of {len(values)} pairs with the lowest means"
    means = {name: sum(found) / len(found) if found else math.inf for name, found in values.items()}
    shown = list(values) if len(values) <= PAIRS else sorted(means, key=means.__getitem__)[:PAIRS]

    def lines_of(run: Run) -> Lines:
        found = lines[runs.index(run)]
        return {name.replace("/", " and "): found[name] for name in shown if name in found}

    return title, lines_of


def _limits(lines: Lines, limits: tuple[float, float]) -> tuple[float, float] | None:
    """Return the limits of the axis: the quantity's own range (low, high), or its lowest tenth, fifth or half if all
    values lie in it; None if a value is outside of the range.
    """
    low, high = limits
    values = [v for _, values in lines.values() for v in values if math.isfinite(v)]
    if not all(low <= v <= high for v in values):
        return None
    parts = (0.1, 0.2, 0.5, 1.0) if low == 0 else (1.0,)
    return low, next(part * high for part in parts if all(v <= part * high for v in values))


def _last_values(runs: Sequence[Run]) -> str:
    columns = {
        "loss": "loss/{}",
        "raw norm": "grad_norm/{}/raw",
        "factor": "grad_norm/{}/scale",
        "norm after": "grad_norm/{}/scaled",
        "share": "grad_norm/{}/share",
        "images/s": "images_per_second/{}",
        "epochs": "epoch/{}",
        "skipped steps": "skipped/{}",
    }
    rows = []
    for run in runs:
        logs = [entry for entry in run.history if "loss" in entry]
        for task in run.tasks if logs else []:
            values = [logs[-1].get(name.format(task)) for name in columns.values()]
            owner = [run.label, task] if len(runs) > 1 else [task]
            rows.append([*owner, *("" if value is None else f"{value:.4g}" for value in values)])
    head = [*(["run", "task"] if len(runs) > 1 else ["task"]), *columns]
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]  # runs of earlier releases log less
    cells = table([head[i] for i in filled], [[row[i] for i in filled] for row in rows])
    return "<h2>Last log of every task</h2>" + cells if rows else ""


def _predictions(runs: Sequence[Run]) -> str:
    """For one run: its pictures. For several: one row per test image, one picture per run."""
    order = list(dict.fromkeys(task for run in runs for task in (*run.tasks, *run.pictures)))
    parts = []
    for task in order:
        most = max(len(run.pictures.get(task, [])) for run in runs)
        rows = []
        for number in range(min(PICTURES_ALONE if len(runs) == 1 else PICTURES_BESIDE, most)):
            drawn = {run.label: run.pictures[task][number] for run in runs if number < len(run.pictures.get(task, []))}
            rows.append([_picture(task, number, file, label if len(runs) > 1 else "") for label, file in drawn.items()])
        files = [file for run in runs for file in (*run.pictures.get(task, ()), *run.worst.get(task, ()))]
        if not rows and (len(runs) > 1 or not files):  # a task of a joint group has only those of low scores
            continue
        small = " small" if _png_width(files[0]) < 400 else ""
        parts.append(f"<h3>{escape(task)}</h3>")
        if len(runs) == 1:
            parts += [f'<div class="pictures{small}">', *(row[0] for row in rows), "</div>"] if rows else []
            parts += _lowest_scores(runs[0], task, small)
        else:
            parts += [f'<div class="pictures beside{small}">' + "".join(row) + "</div>" for row in rows]
    return "<h2>Predictions</h2>" + "".join(parts) if parts else ""


def _lowest_scores(run: Run, task: str, small: str) -> list[str]:
    files, images = run.worst.get(task, []), run.details.get(task, {}).get("worst", [])
    drawn = [
        _picture(task, number, file, f"{Path(found['path']).name}: {found['score']:.3f}")
        for number, (file, found) in enumerate(zip(files, images, strict=False))
    ]
    return ["<h4>Lowest scores</h4>", f'<div class="pictures{small}">', *drawn, "</div>"] if drawn else []


def _picture(task: str, number: int, file: Path, label: str) -> str:
    description = f"{task}, test image {number + 1}{' by ' + label if label else ''}: prediction and truth"
    return figure(image("image/png", file.read_bytes(), description), label)


def _png_width(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[16:20], "big")


def _configuration(run: Run) -> str:
    text = escape(yaml.safe_dump(run.config, sort_keys=False, width=90))
    return f"<details><summary>Configuration of {escape(run.label)}</summary><pre>{text}</pre></details>"
