"""Plots of values over steps: files of a run, and small SVG pictures with their description for a page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#3366aa", "#cc6633", "#2f8f4e", "#8855aa", "#b8860b", "#444444", "#cc3377", "#119999")
Lines = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""{label: (steps, values)}"""


def series(
    history: Sequence[dict[str, Any]], prefix: str, suffix: str = ""
) -> dict[str, tuple[list[int], list[float]]]:
    """{task: (steps, values)} of the log entries named PREFIX + task + SUFFIX.

    Args:
        history: `trainer.state.log_history`.
        prefix: for example "grad_norm/".
        suffix: for example "/raw".
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(prefix) and key.endswith(suffix) and value is not None and "step" in entry:
                steps, values = found.setdefault(key[len(prefix) : len(key) - len(suffix)], ([], []))
                steps.append(entry["step"])
                values.append(value)
    return found


def svg(
    lines: Lines,
    title: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    labels: Sequence[str] = (),
) -> str:
    """One plot as a self-contained SVG picture that scales.

    Args:
        lines: one line a label.
        title: above the plot.
        log: logarithmic axis of values.
        limits: of the axis of values.
        labels: all labels of a page, so that one has the same colour in every plot; () is those of `lines`.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.3))
    _draw(axis, lines, title, log, labels)
    if limits is not None:
        axis.set_ylim(*limits)
    figure.tight_layout()
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]


def describe(lines: Lines, title: str) -> str:
    """A plot in one sentence, for those who do not see it: where every line begins, ends, and lies in between."""
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
    """Write loss.png, norms.png and (when there was an evaluation) metrics.png.

    Args:
        history: `trainer.state.log_history`.
        folder: made when missing.

    Returns:
        The files written.
    """
    plt = _pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        written.append(folder / name)

    figure, axis = plt.subplots(figsize=(7, 4))
    _draw(axis, series(history, "loss/"), "loss of each task", log=True)
    save(figure, "loss.png")

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    _draw(axes[0], series(history, "grad_norm/", "/raw"), "backbone gradient norm of each task, before balancing", True)
    _draw(axes[1], series(history, "grad_norm/", "/scale"), "factor it got", True)
    _draw(axes[2], series(history, "grad_norm/", "/scaled"), "norm after balancing", True)
    axes[2].set_ylim(axes[0].get_ylim())  # the same axis: before and after can be compared
    save(figure, "norms.png")

    shown = {f: v for f, v in series(history, "eval_").items() if not f.endswith(("_samples", "runtime"))}
    if shown:
        figure, axis = plt.subplots(figsize=(7, 4))
        _draw(axis, shown, "evaluation", log=False)
        axis.set_ylim(0, 1)
        save(figure, "metrics.png")
    return written


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _draw(axis: Any, data: Lines, title: str, log: bool, labels: Sequence[str] = ()) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    order = list(labels or data)
    for label, (steps, values) in data.items():
        color = COLORS[order.index(label) % len(COLORS)]
        axis.plot(steps, values, label=label, color=color, linewidth=1.4, marker="." if len(steps) < 12 else None)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axis.set_yscale("log")
        positive = [v for _, values in data.values() for v in values if math.isfinite(v) and v > 0]
        if positive and max(positive) < 30 * min(positive):  # few powers of ten: name numbers between them
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            if max(positive) < 1.02 * min(positive):  # do not blow rounding up to a curve
                axis.set_ylim(min(positive) / 2, max(positive) * 2)
    if data:
        axis.legend(frameon=False, fontsize=9)
