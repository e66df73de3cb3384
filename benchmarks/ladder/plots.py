"""Plots of the ladder's records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ladder.plan import BLOCKS, SINGLE
from benchmarks.ladder.records import Records
from benchmarks.ladder.stats import Comparison, compare
from benchmarks.ladder.table import METRICS, REFERENCE, TITLES, Block, against_sum

AGAINST_SUM = "evidence-against-sum.png"
"""Name of the plot that opens the page."""


def write_plots(records: Records, folder: Path) -> dict[Path, str]:
    """Draw the plots for which there are records.

    These are evidence-against-sum.png (differences to the plain sum, of every block), evidence-DATA-OPTIMIZER.png
    (scores by method and seed), evidence-rates-*.png (scores by learning rate) and evidence-norms-*.png (norms and
    parts of the update in the validation runs at the chosen rates).

    Returns:
        Written file -> its caption.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    written: dict[Path, str] = {}

    def save(figure: Any, name: str, shows: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        written[folder / name] = shows

    differences = {key: found for key in BLOCKS if (found := _differences(Block(records, *key)))}
    if differences:
        save(_against_sum(plt, differences), AGAINST_SUM, "Mean relative change less that of the plain sum")
    for data, optimizer in BLOCKS:
        block, title = Block(records, data, optimizer), TITLES[data, optimizer]
        if any(block.runs[method] for method in block.multi):
            shows = f"Test scores by method, {title}: a dot a seed, the bar their mean, dashed the single-task models"
            save(_scores(plt, block), f"evidence-{data}-{optimizer}.png", shows)
        if any(record for method in block.methods for _, record in block.choices(method)):
            shows = f"Validation scores by learning rate, {title}"
            save(_rates(plt, block), f"evidence-rates-{data}-{optimizer}.png", shows)
        if all(block.chosen_run(method) for method in ("sum", REFERENCE)):
            shows = (
                f"Backbone gradient norms over the validation run at the chosen rate, and every task's share, {title}"
            )
            save(_norms(plt, block), f"evidence-norms-{data}-{optimizer}.png", shows)
    return written


def _differences(block: Block) -> dict[str, Comparison]:
    """Return every method's difference to the plain sum, for methods with two seeds and more."""
    return {method: compare(values) for method, values in against_sum(block).items() if len(values) > 1}


def _against_sum(plt: Any, differences: dict[tuple[str, str], dict[str, Comparison]]) -> Any:
    rows = [len(found) + 1 for found in differences.values()]
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8, 0.32 * sum(rows) + 0.5 * len(rows) + 0.5), squeeze=False, sharex=True,
        gridspec_kw={"height_ratios": rows},
    )  # fmt: skip
    for axis, (key, found) in zip(axes[:, 0], differences.items(), strict=True):
        order = sorted(found, key=lambda method: found[method].mean)
        for row, method in enumerate(order):
            low, mean, high = (100 * value for value in (found[method].low, found[method].mean, found[method].high))
            sure = low > 0 or high < 0
            color = "#999999" if not sure else "#2f8f4e" if mean > 0 else "#c0392b"
            axis.plot([low, high], [row, row], color=color, linewidth=2)
            axis.plot([mean], [row], "o", color=color, markersize=6)
        axis.axvline(0, color="#444444", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(order)), order)
        axis.set_ylim(-0.6, len(order) - 0.4)
        seeds = max(one.n for one in found.values())
        axis.set_title(f"{TITLES[key]}, {seeds} seeds", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("difference to the plain sum, points of mean relative change (line: 95 % interval)")
    return figure


def _rates(plt: Any, block: Block) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4))
    for number, method in enumerate(block.methods):
        found = [(lr, statistics.fmean(record["metrics"].values())) for lr, record in block.choices(method) if record]
        style = {"linestyle": ":"} if method in SINGLE else {}
        if found:
            axis.plot(*zip(*found, strict=True), marker="o", markersize=4, color=f"C{number}", label=method, **style)
    tried = sorted({lr for method in block.methods for lr, _ in block.choices(method)})
    axis.set_xscale("log")
    axis.set_xticks(tried, [f"{lr:g}" for lr in tried], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("learning rate")
    axis.set_title("score on validation (dotted: a single task's own metric)", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def _scores(plt: Any, block: Block) -> Any:
    panels = len(block.tasks) + 1
    columns = min(panels, 5)
    rows = -(-panels // columns)
    height = rows * (0.45 * len(block.multi) + 1.6)
    figure, grid = plt.subplots(rows, columns, figsize=(3.5 * columns, height), sharey=True, squeeze=False)
    for axis in grid.flat[panels:]:
        axis.set_visible(False)
    axes = grid.flat[:panels]
    order = list(reversed(block.multi))
    for axis, task in zip(axes, block.tasks, strict=False):
        for row, method in enumerate(order):
            _row(axis, row, [run["metrics"][task] for run in block.runs[method].values()])
        name = f"single_{task}"
        alone = [run["metrics"][task] for run in block.runs.get(name, {}).values()]
        if alone:
            axis.axvline(statistics.fmean(alone), color="#444444", linewidth=1, linestyle="--")
        axis.set_title(f"{task}, {METRICS[task]}", fontsize=10, loc="left")
    for row, method in enumerate(order):
        _row(axes[-1], row, [100 * value for value in block.change(method).values()])
    axes[-1].axvline(0, color="#444444", linewidth=1, linestyle="--")
    axes[-1].set_title(f"{block.measure}, %", fontsize=10, loc="left")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(-0.5, len(order) - 0.5)
    return figure


def _row(axis: Any, row: int, values: Sequence[float]) -> None:
    axis.plot(values, [row] * len(values), "o", color="#3366aa", alpha=0.45, markersize=5)
    if values:
        axis.plot([statistics.fmean(values)], [row], "|", color="#cc6633", markersize=16, markeredgewidth=2)


def _norms(plt: Any, block: Block) -> Any:
    palette = ("#3366aa", "#cc6633", "#2f8f4e", "#8a5aa8", "#b8860b", "#5aa8a0", "#a83f5a", "#777777")
    colors = dict(zip(block.tasks, palette, strict=False))
    runs = {method: run for method in block.multi if (run := block.chosen_run(method)) is not None}
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6))
    for axis, method in zip(axes, ("sum", REFERENCE), strict=False):
        run = runs[method]
        for task in block.tasks:
            curve = run["norms"][task]["curve"]
            steps = [run["logging_steps"] * (i + 1) for i in range(len(curve))]
            axis.plot(steps, curve, color=colors[task], label=task, linewidth=1.4)
            axis.plot(steps, run["scaled"][task], color=colors[task], linewidth=1.2, linestyle=":")
        axis.set_yscale("log")
        axis.set_xlabel("optimizer step")
        axis.set_title(f"{method}: backbone norm, raw (line) and as used (dots)", fontsize=10, loc="left")
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].sharey(axes[1])
    left = [0.0] * len(runs)
    for task in block.tasks:
        part = [run["shares"][task] for run in runs.values()]
        axes[2].barh(list(runs), part, left=left, color=colors[task])
        left = [a + b for a, b in zip(left, part, strict=True)]
    axes[2].invert_yaxis()
    axes[2].set_title("share of the backbone's squared gradient", fontsize=10, loc="left")
    return figure
