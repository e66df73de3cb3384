"""One self-contained page of HTML about one run, or about several side by side. Needs no torch."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from allinone_ds.reporting.plots import Lines, describe, series, svg
from allinone_ds.reporting.run_history import Run, flat_values, is_number, read_run
from allinone_ds.reporting.text import clock
from allinone_ds.run_folder.names import REPORT_FILE

# The first line forbids the page to load anything from anywhere.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem; color: #1b1b1b; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; } .note { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } caption { text-align: left; color: #555; padding: .2rem 0; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font-size: .85rem; } td code { overflow-wrap: break-word; } pre { overflow-x: auto; }
.plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(45%, 200px), 1fr)); }
.beside { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin-bottom: 12px; }
.beside.small { grid-template-columns: repeat(auto-fit, minmax(min(45%, 150px), 320px)); }
figure { margin: 0; } figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
@media (max-width: 500px) { body { padding: .7rem; } th, td { padding-right: .55rem; font-size: .85rem; } }
.plots img { width: 100%; max-width: 640px; }
"""
_MOST = 50  # of the latest starts, stops and warnings of a run
PICTURES_ALONE, PICTURES_BESIDE = 12, 4
"""Test images shown of a task: for one run, and for each of several."""


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page: results, plots, predictions, last values and configuration of every run.

    Args:
        folders: of one run or several; a run may still be going on.
        output: the file; None is report.html in the first run's folder.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is not that of a run.
    """
    runs = [read_run(folder) for folder in folders]
    for other in (lambda run: run.folder.name, lambda run: str(run.folder)):  # until no two are alike
        labels = [run.label for run in runs]
        for run in runs:
            if labels.count(run.label) > 1:
                run.label = other(run)
    target = Path(output) if output is not None else runs[0].folder / REPORT_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(runs))
    return target


# ---- the page ----


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.label for run in runs)}"
    parts = [f"<h1>{html.escape(title)}</h1>", _results(runs)]
    if len(runs) > 1:
        parts.append(_differences(runs))
    parts += [_happenings(runs), _plots(runs), _last_values(runs), _predictions(runs)]
    parts += [_configuration(run) for run in runs]
    body = "\n".join(part for part in parts if part)
    return f"{HEAD}<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"


def _results(runs: Sequence[Run]) -> str:
    rows: dict[str, list[str]] = {
        "steps": [],
        "ranks": [],
        "training time": [],
        "peak memory of a rank, GiB": [],
        "images that could not be read": [],
    }
    metrics = list(dict.fromkeys(key for run in runs for key in _metric_names(run)))
    for run in runs:
        last = run.history[-1]["step"] if run.history else 0
        rows["steps"].append(str(run.metrics.get("steps", f"{last}, not ended")))
        rows["ranks"].append(str(run.metrics.get("world_size", "")))
        rows["training time"].append(clock(run.metrics["train_runtime"]) if "train_runtime" in run.metrics else "")
        peaks = [entry["memory/peak_gib"] for entry in run.history if "memory/peak_gib" in entry]
        rows["peak memory of a rank, GiB"].append(f"{max(peaks):.2f}" if peaks else "")
        broken = [entry["broken_images"] for entry in run.history if "broken_images" in entry]
        rows["images that could not be read"].append(str(broken[-1]) if broken else "")
    table = [[name, *values] for name, values in rows.items()]
    for key in metrics:
        values = [run.evaluation().get(key) for run in runs]
        name = "score (mean of main metrics)" if key == "eval_score" else _readable(key, runs)
        table.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return "<h2>Results</h2>" + _table(["", *(run.label for run in runs)], table)


def _metric_names(run: Run) -> list[str]:
    """Names of the metrics of a run's evaluation, the score last."""
    skip = ("_samples", "_broken", "_runtime", "_score")
    names = [key for key in run.evaluation() if key.startswith("eval_") and not key.endswith(skip)]
    return [*names, "eval_score"] if "eval_score" in run.evaluation() else names


def _readable(key: str, runs: Sequence[Run]) -> str:
    tasks = sorted({task for run in runs for task in run.tasks}, key=len, reverse=True)
    for start, more in (("eval_", ""), ("eval_ema_", ", averaged weights")):
        rest = key.removeprefix(start)
        for task in tasks:
            if rest.startswith(f"{task}_"):
                return f"{task}: {rest.removeprefix(f'{task}_')}{more}"
    return key.removeprefix("eval_")


def _differences(runs: Sequence[Run]) -> str:
    flat = [flat_values(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = []
    for key in keys:
        values = [values.get(key, "(absent)") for values in flat]
        if any(value != values[0] for value in values[1:]) and key != "output_dir":
            rows.append([f"<code>{html.escape(key)}</code>", *(f"<code>{html.escape(str(v))}</code>" for v in values)])
    if not rows:
        return "<h2>Configuration differences</h2><p>None: the runs have one configuration.</p>"
    return "<h2>Configuration differences</h2>" + _table(["key", *(r.label for r in runs)], rows, raw=True)


def _plots(runs: Sequence[Run]) -> str:
    """For one run a plot a quantity with a line a task; for several a plot a quantity and task with a line a run."""
    wanted: list[tuple[str, Callable[[Run], Lines], bool, tuple[float, float] | None]] = [
        ("loss", lambda run: series(run.history, "loss/"), True, None),
        ("evaluation", _evaluation_lines, False, (0.0, 1.0)),
        ("backbone gradient norm before balancing", _norms("/raw"), True, None),
        ("factor that the gradient got", _norms("/scale"), True, None),
        ("backbone gradient norm after balancing", _norms("/scaled"), True, None),
        ("share of the squared norm of the update", _norms("/share"), False, (0.0, 1.0)),
        ("cosine of two tasks' backbone gradients", _cosines, False, (-1.0, 1.0)),
        ("images a second", lambda run: series(run.history, "images_per_second/"), False, None),
        ("seconds a step", lambda run: series(run.history, "seconds/"), False, None),
    ]
    figures = []
    for title, lines_of, log, limits in wanted:
        by_run = {run.label: lines_of(run) for run in runs}
        if len(runs) == 1:
            panels = {title: by_run[runs[0].label]}
        else:
            panels = {
                f"{title}: {label}": {run: lines[label] for run, lines in by_run.items() if label in lines}
                for label in dict.fromkeys(label for lines in by_run.values() for label in lines)
            }
        for name, lines in panels.items():
            if any(len(steps) > 1 for steps, _ in lines.values()):  # one point is no curve; the tables have it
                limits_here = _limits(lines, limits) if limits else None
                labels = [run.label for run in runs] if len(runs) > 1 else []
                picture = _data("image/svg+xml", svg(lines, name, log, limits_here, labels).encode())
                figures.append(f'<img alt="{html.escape(describe(lines, name))}" src="{picture}">')
    return f'<h2>Training</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def _norms(suffix: str) -> Callable[[Run], Lines]:
    return lambda run: series(run.history, "grad_norm/", suffix)


def _evaluation_lines(run: Run) -> Lines:
    found = series(run.history, "eval_")
    return {_readable(f"eval_{name}", [run]): found[name] for name in found if f"eval_{name}" in _metric_names(run)}


def _cosines(run: Run) -> Lines:
    found = series(run.history, "cosine/")
    return {name.replace("/", " and "): line for name, line in found.items()}


def _limits(lines: Lines, limits: tuple[float, float]) -> tuple[float, float] | None:
    """The quantity's own range, of which small values get the lowest tenth, fifth or half; None where it is left."""
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
            who = [run.label, task] if len(runs) > 1 else [task]
            rows.append([*who, *("" if value is None else f"{value:.4g}" for value in values)])
    head = [*(["run", "task"] if len(runs) > 1 else ["task"]), *columns]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]  # runs of earlier releases log less
    table = _table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])
    return "<h2>Last log of every task</h2>" + table if rows else ""


def _predictions(runs: Sequence[Run]) -> str:
    """For one run its pictures; for several a row an image with a picture a run."""
    order = list(dict.fromkeys(task for run in runs for task in (*run.tasks, *run.pictures)))
    parts = []
    for task in order:
        most = max(len(run.pictures.get(task, [])) for run in runs)
        rows = []
        for number in range(min(PICTURES_ALONE if len(runs) == 1 else PICTURES_BESIDE, most)):
            drawn = {run.label: run.pictures[task][number] for run in runs if number < len(run.pictures.get(task, []))}
            rows.append([_figure(task, number, file, label if len(runs) > 1 else "") for label, file in drawn.items()])
        if not rows:
            continue
        first = next(run.pictures[task][0] for run in runs if run.pictures.get(task))
        small = " small" if _png_width(first) < 400 else ""
        parts.append(f"<h3>{html.escape(task)}</h3>")
        if len(runs) == 1:
            parts += [f'<div class="pictures{small}">', *(row[0] for row in rows), "</div>"]
        else:
            parts += [f'<div class="pictures beside{small}">' + "".join(row) + "</div>" for row in rows]
    return "<h2>Predictions</h2>" + "".join(parts) if parts else ""


def _figure(task: str, number: int, file: Path, label: str) -> str:
    text = html.escape(f"{task}, test image {number + 1}{' by ' + label if label else ''}: prediction and truth")
    picture = _data("image/png", file.read_bytes())
    caption = f"<figcaption>{html.escape(label)}</figcaption>" if label else ""
    return f'<figure><img alt="{text}" src="{picture}">{caption}</figure>'


def _png_width(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[16:20], "big")


def _configuration(run: Run) -> str:
    text = html.escape(yaml.safe_dump(run.config, sort_keys=False, width=90))
    return f"<details><summary>Configuration of {html.escape(run.label)}</summary><pre>{text}</pre></details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], raw: bool = False) -> str:
    """A table whose first column names the row; figures are set right."""
    cells = [[cell if raw else html.escape(cell) for cell in row] for row in rows]

    def tag(text: str, column: int, name: str) -> str:
        number = column > 0 and not raw and all(is_number(row[column]) for row in rows)
        attributes = (' scope="col"' if name == "th" else "") + (' class="number"' if number else "")
        return f"<{name}{attributes}>{text}</{name}>"

    first = "".join(tag(html.escape(text), i, "th") for i, text in enumerate(head))
    rest = "".join(f"<tr>{''.join(tag(text, i, 'td') for i, text in enumerate(row))}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _happenings(runs: Sequence[Run]) -> str:
    rows = [[run.label, str(step), words] for run in runs for step, words in run.events[-_MOST:]]
    if not rows:
        return ""
    first = 0 if len(runs) > 1 else 1
    return "<h2>Starts, stops and warnings</h2>" + _table(
        ["run", "step", "what"][first:], [row[first:] for row in rows]
    )
