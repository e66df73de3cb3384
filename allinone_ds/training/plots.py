"""Plots of a run: loss of every task, and raw norm and scale of every task's backbone gradient, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#3366aa", "#cc6633", "#2f8f4e", "#8855aa", "#b8860b", "#444444", "#cc3377", "#119999")


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


def write_plots(history: Sequence[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Write loss.png, norms.png and (when there was an evaluation) metrics.png.

    Args:
        history: `trainer.state.log_history`.
        folder: made when missing.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})

    def draw(axis: Any, data: dict[str, tuple[list[int], list[float]]], title: str, log: bool) -> None:
        for (task, (steps, values)), color in zip(data.items(), COLORS * len(data), strict=False):
            axis.plot(steps, values, label=task, color=color, linewidth=1.4, marker="." if len(steps) < 12 else None)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axis.set_yscale("log")
        if data:
            axis.legend(frameon=False, fontsize=9)

    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        written.append(folder / name)

    figure, axis = plt.subplots(figsize=(7, 4))
    draw(axis, series(history, "loss/"), "loss of each task", log=True)
    save(figure, "loss.png")

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    draw(axes[0], series(history, "grad_norm/", "/raw"), "backbone gradient norm of each task, before balancing", True)
    draw(axes[1], series(history, "grad_norm/", "/scale"), "factor it got", True)
    draw(axes[2], series(history, "grad_norm/", "/scaled"), "norm after balancing", True)
    axes[2].set_ylim(axes[0].get_ylim())  # the same axis: before and after can be compared
    save(figure, "norms.png")

    shown = {f: v for f, v in series(history, "eval_").items() if not f.endswith(("_samples", "runtime"))}
    if shown:
        figure, axis = plt.subplots(figsize=(7, 4))
        draw(axis, shown, "evaluation", log=False)
        axis.set_ylim(0, 1)
        save(figure, "metrics.png")
    return written
