"""Plots of values over steps: image files of a run, and SVG images with descriptions for a page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allinone_ds.evaluation.metrics import labelled_metrics

COLORS = ("#3366aa", "#cc6633", "#2f8f4e", "#8855aa", "#b8860b", "#444444", "#cc3377", "#119999")
_STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_INSIDE = 4
"""Lines whose names are inside a plot; those of more are below it."""
_WIDTH, _HANDLE = 130, 6
"""Letters of a line of names below a plot, and those that the piece of line beside a name takes."""
_ALL_METRICS = 10
"""Tasks of which a plot shows all metrics; of more it shows the main ones."""
Lines = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""label -> (steps, values)"""


def series(
    history: Sequence[dict[str, Any]], prefix: str, suffix: str = ""
) -> dict[str, tuple[list[int], list[float]]]:
    """Return task -> (steps, values) of the log entries named PREFIX + task + SUFFIX.

    Args:
        history: `trainer.state.log_history`.
        prefix: for example "grad_norm/".
        suffix: for example "/raw".

    Example:
        >>> series([{"step": 1, "loss/det": 2.0}, {"step": 2, "loss/det": 1.5}], "loss/")
        {'det': ([1, 2], [2.0, 1.5])}
    """
    return _lines(
        history,
        lambda entry: {
            key[len(prefix) : len(key) - len(suffix)]: value
            for key, value in entry.items()
            if key.startswith(prefix) and key.endswith(suffix) and value is not None
        },
    )


def evaluation_lines(
    history: Sequence[dict[str, Any]], tasks: Sequence[str]
) -> dict[str, tuple[list[int], list[float]]]:
    """Return "TASK: METRIC" -> (steps, values) of every metric of the tasks, and "score"; of many tasks the main ones.

    Args:
        history: `trainer.state.log_history`.
        tasks: names of the run's tasks.
    """
    lines = _lines(history, lambda entry: labelled_metrics(entry, tasks))
    if len(tasks) <= _ALL_METRICS:
        return lines
    first = {label.partition(": ")[0]: label for label in reversed(lines)}  # a task's main metric is its first one
    return {label: line for label, line in lines.items() if label in first.values()}


def _lines(
    history: Sequence[dict[str, Any]], values_of: Callable[[dict[str, Any]], Mapping[str, float]]
) -> dict[str, tuple[list[int], list[float]]]:
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for label, value in values_of(entry).items() if "step" in entry else ():
            steps, values = lines.setdefault(label, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return lines


def svg(
    lines: Lines,
    title: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    labels: Sequence[str] = (),
) -> str:
    """Return one plot as SVG text.

    Args:
        lines: one line per label.
        title: text above the plot.
        log: whether the axis of values is logarithmic.
        limits: lowest and highest value of that axis.
        labels: all labels of a page, which gives a label the same colour in every plot; () means those of `lines`.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.3))
    _draw(axis, lines, title, log, labels)
    if limits is not None:
        axis.set_ylim(*limits)
    _arrange(figure)
    target = io.StringIO()
    figure.savefig(target, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]


def describe(lines: Lines, title: str) -> str:
    """Return a plot as one sentence for readers who cannot see it: first, last, lowest and highest value per line.

    Example:
        >>> describe({"det": ([1, 2, 3], [2.0, 0.5, 1.0])}, "loss")
        'loss: det from 2 (step 1) to 1 (step 3), between 0.5 and 2.'
    """
    parts = []
    for label, (steps, values) in lines.items():
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            parts.append(f"{label} without a finite value")
        elif len(finite) == 1:
            parts.append(f"{label} {finite[0]:.3g} at step {steps[0]}")
        else:
            parts.append(
                f"{label} from {finite[0]:.3g} (step {steps[0]}) to {finite[-1]:.3g} (step {steps[-1]}), "
                f"between {min(finite):.3g} and {max(finite):.3g}"
            )
    return f"{title}: {'; '.join(parts) or 'no values'}."


def write_plots(history: Sequence[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Write loss.png, norms.png and, if the run was evaluated, metrics.png.

    Args:
        history: `trainer.state.log_history`.
        folder: folder for the files; created if missing.

    Returns:
        The files written.

    Example::

        write_plots(trainer.state.log_history, "runs/demo/plots")
    """
    plt = _pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        _arrange(figure)
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        plt.close(figure)
        written.append(folder / name)

    figure, axis = plt.subplots(figsize=(7, 4))
    _draw(axis, series(history, "loss/"), "loss per task", log=True)
    save(figure, "loss.png")

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    _draw(axes[0], series(history, "grad_norm/", "/raw"), "backbone gradient norm per task, before balancing", True)
    _draw(axes[1], series(history, "grad_norm/", "/scale"), "factor of the gradient", True)
    _draw(axes[2], series(history, "grad_norm/", "/scaled"), "norm after balancing", True)
    axes[2].set_ylim(axes[0].get_ylim())  # the same axis, so that before and after can be compared
    save(figure, "norms.png")

    metrics = evaluation_lines(history, list(series(history, "loss/")))
    if metrics:
        figure, axis = plt.subplots(figsize=(7, 4))
        _draw(axis, metrics, "evaluation", log=False)
        axis.set_ylim(0, 1)
        save(figure, "metrics.png")
    return written


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _arrange(figure: Any) -> None:
    figure.tight_layout()
    for axis in figure.axes:
        if (legend := axis.get_legend()) is not None:
            legend.set_in_layout(True)


def _draw(axis: Any, data: Lines, title: str, log: bool, labels: Sequence[str] = ()) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    order = list(labels or data)
    for label, (steps, values) in data.items():
        style, color = divmod(order.index(label), len(COLORS))
        marker = "." if len(steps) < 12 else None
        look = {"color": COLORS[color], "linestyle": _STYLES[style % len(_STYLES)], "linewidth": 1.4, "marker": marker}
        axis.plot(steps, values, label=label, **look)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axis.set_yscale("log")
        positive = [v for _, values in data.values() for v in values if math.isfinite(v) and v > 0]
        if positive and max(positive) < 30 * min(positive):  # few powers of ten: label values between them
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            if max(positive) < 1.02 * min(positive):  # rounding errors should not look like a curve
                axis.set_ylim(min(positive) / 2, max(positive) * 2)
    if len(data) > _INSIDE:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "borderaxespad": 0}
        columns = max(1, min(4, _WIDTH // (_HANDLE + max(map(len, data)))))  # more would make the picture wider
        legend = axis.legend(frameon=False, fontsize=7, ncols=columns, handlelength=2, **place)
        legend.set_in_layout(False)  # the plot keeps its height, and the picture becomes higher
    elif data:
        axis.legend(frameon=False, fontsize=9)
