"""What the records of `ladder.py` say: tables, paired tests over seeds and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ladder_plan import BLOCKS, CHOICE_SEED, METHODS, SEEDS, SINGLE, TASKS, Records, Spec, rates

METRICS = {"detection": "mAP50", "segmentation": "mIoU", "classification": "top-1"}
ALPHA = 0.05
BEGIN, END = "<!-- written by benchmarks/ladder.py: begin -->", "<!-- written by benchmarks/ladder.py: end -->"
REFERENCE = "tbgc"

# ---- statistics ----


@dataclass(frozen=True)
class Comparison:
    """Mean of paired differences and what a two-sided paired t-test says of it."""

    n: int
    mean: float
    low: float
    """Lower end of the 95 % confidence interval of the mean."""
    high: float
    p: float
    detectable: float
    """The smallest true mean difference that such a test finds with a probability of 80 % at level 0.05, given the
    spread seen."""


def compare(differences: Sequence[float]) -> Comparison:
    """Test paired differences, one a seed, against 0.

    Args:
        differences: at least two.
    """
    from scipy import stats

    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Comparison(n, mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean / error), n - 1))
    return Comparison(n, mean, mean - half, mean + half, p, smallest_effect(n) * error * math.sqrt(n))


@lru_cache
def smallest_effect(n: int, power: float = 0.8) -> float:
    """The smallest mean difference, in standard deviations of the differences, that a two-sided paired t-test of n
    pairs finds with this probability at level 0.05."""
    import numpy as np
    from scipy import stats
    from scipy.optimize import brentq

    edge = stats.t.ppf(1 - ALPHA / 2, n - 1)
    # Power by quantiles of the standard deviation that n pairs may show; scipy's noncentral t gives NaN far out.
    levels = (np.arange(4000) + 0.5) / 4000
    limits = edge * np.sqrt(stats.chi2.ppf(levels, n - 1) / (n - 1))

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift))) - power

    return float(brentq(missing, 0.01, 100))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests, in the order given."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def relative_change(scores: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Mean over the tasks of `single` of (multi-task score - single-task score) / single-task score."""
    return statistics.fmean((scores[task] - single[task]) / single[task] for task in single)


# ---- a block of records ----


class Block:
    """The test records of one data set and optimizer.

    Args:
        records: of a size.
        data, optimizer: which block.
    """

    def __init__(self, records: Records, data: str, optimizer: str):
        self.records, self.data, self.optimizer = records, data, optimizer
        self.methods = BLOCKS[data, optimizer]
        self.multi = [method for method in self.methods if method in METHODS]
        self.runs: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in self.methods}
        for method in self.methods:
            lr = records.chosen(data, optimizer, method)
            for seed in SEEDS if lr is not None else ():
                record = records.read(Spec(data, optimizer, method, lr, seed, "test"))
                if record is not None:
                    self.runs[method][seed] = record
        self.single: dict[int, dict[str, float]] = {}  # by seed, where all single-task models are there
        names = [method for method in self.methods if method in SINGLE]
        for seed in SEEDS:
            if all(seed in self.runs[name] for name in names):
                self.single[seed] = {SINGLE[n]: self.runs[n][seed]["metrics"][SINGLE[n]] for n in names}

    def choices(self, method: str) -> list[tuple[float, dict[str, Any] | None]]:
        """(rate, validation record) of a method."""
        return [(s.lr, self.records.read(s)) for s in self.records.choice(self.data, self.optimizer, method)]

    def change(self, method: str) -> dict[int, float]:
        """Mean relative change against the single-task models, by seed."""
        runs = self.runs[method]
        return {s: relative_change(runs[s]["metrics"], self.single[s]) for s in runs if s in self.single}

    def missing(self) -> tuple[int, int]:
        """Runs that are missing, and runs in all."""
        chosen = sum(record is None for method in self.methods for _, record in self.choices(method))
        seeds = sum(len(SEEDS) - len(runs) for runs in self.runs.values())
        return chosen + seeds, len(self.methods) * (3 + len(SEEDS))


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean ± sample standard deviation; the mean alone of one value."""
    if not values:
        return "missing"
    deviation = f" ± {form(statistics.stdev(values)).removeprefix('+')}" if len(values) > 1 else ""
    return form(statistics.fmean(values)) + deviation


def _three(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


# ---- the report, as lines of Markdown ----


def rates_table(block: Block) -> list[str]:
    """Validation score of every method at every rate; the chosen one bold."""
    lines = ["| method | rate: score on validation (chosen in bold) | the best is |", "|---|---|---|"]
    for method in block.methods:
        found = block.choices(method)
        best = block.records.chosen(block.data, block.optimizer, method)
        cells = []
        for lr, record in found:
            score = "missing" if record is None else _three(statistics.fmean(record["metrics"].values()))
            score = "diverged" if record is not None and record["diverged"] else score
            cells.append(f"**{lr:g}: {score}**" if lr == best else f"{lr:g}: {score}")
        order = rates(block.optimizer, method)
        place = (
            "not known"
            if best is None
            else {0: "the lowest tried", 1: "inside"}.get(order.index(best), "the highest tried")
        )
        lines.append(f"| {method} | {' · '.join(cells)} | {place} |")
    return lines


def results_table(block: Block) -> list[str]:
    """Metrics on the test split, mean relative change, shares and time of every method."""
    names = " | ".join([*METRICS.values(), "mean relative change, %", "share of the update det / seg / cls, %"])
    lines = [
        f"| method | seeds | {names} | wall s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    singles = [method for method in block.methods if method in SINGLE]
    if singles:
        cells = dict.fromkeys(TASKS, "")
        for method in singles:
            runs = block.runs[method].values()
            cells[SINGLE[method]] = spread([run["metrics"][SINGLE[method]] for run in runs], _three)
        times = [
            sum(statistics.fmean(run[key] for run in block.runs[m].values()) for m in singles)
            if all(block.runs[m] for m in singles) else math.nan
            for key in ("wall_seconds", "cpu_seconds")
        ]  # fmt: skip
        seeds = min(len(block.runs[method]) for method in singles)
        lines.append(
            f"| single-task models | {seeds} | {' | '.join(cells.values())} | 0 | | {times[0]:.0f} | {times[1]:.0f} |"
        )
    for method in block.multi:
        runs = list(block.runs[method].values())
        cells = {task: spread([run["metrics"][task] for run in runs], _three) for task in TASKS}
        whole = [run for run in runs if not run["diverged"]]
        share = (
            " / ".join(_percent(statistics.fmean(run["shares"][t] for run in whole)) for t in TASKS) if whole else ""
        )
        seconds = [
            f"{statistics.fmean(run[key] for run in runs):.0f}" if runs else ""
            for key in ("wall_seconds", "cpu_seconds")
        ]
        change = spread(list(block.change(method).values()), _signed)
        lines.append(
            f"| {method} | {len(runs)} | {' | '.join(cells.values())} | {change} | {share} | {' | '.join(seconds)} |"
        )
    return lines


def tests_table(block: Block) -> list[str]:
    """Paired tests over seeds, three families, each with Holm's correction."""
    against = {
        f"{REFERENCE} - {method}": _paired(block.change(REFERENCE), block.change(method))
        for method in block.multi
        if method != REFERENCE
    }
    families = {f"{REFERENCE} against the other methods, mean relative change in percentage points": against}
    if len(block.single and next(iter(block.single.values()))) == len(TASKS):
        families["every method against single-task models, mean relative change in percentage points"] = {
            f"{method} - single-task": list(block.change(method).values()) for method in block.multi
        }
    families[f"{REFERENCE} against the plain sum, task by task, metric in hundredths"] = {
        f"{METRICS[task]}: {REFERENCE} - sum": _paired(
            *({s: run["metrics"][task] for s, run in block.runs[m].items()} for m in (REFERENCE, "sum"))
        )
        for task in TASKS
    }
    lines = []
    for title, family in families.items():
        tested = {name: compare(values) for name, values in family.items() if len(values) > 1}
        adjusted = dict(zip(tested, holm([c.p for c in tested.values()]), strict=True))
        lines += [f"{title[0].upper()}{title[1:]}:", ""]
        lines += ["| difference | seeds | mean | 95 % interval | p | p, Holm | verdict | 80 % power from |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, values in family.items():
            if name not in tested:
                lines.append(f"| {name} | {len(values)} | | | | | not enough seeds yet | |")
                continue
            c = tested[name]
            verdict = "significant" if adjusted[name] < ALPHA else "not significant"
            if c.n < len(SEEDS):
                verdict = f"preliminary: {verdict}"
            lines.append(
                f"| {name} | {c.n} | {_signed(c.mean)} | {_signed(c.low)} to {_signed(c.high)} | {c.p:.3f} "
                f"| {adjusted[name]:.3f} | {verdict} | {_percent(c.detectable)} |"
            )
        lines.append("")
    return lines


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def norms_table(block: Block) -> list[str]:
    """Median raw backbone norms and how often they were below the clip, from runs of the chosen rate."""
    lines = [
        "| method | median raw norm det / seg / cls | windows of steps with a norm below 0.1, % |",
        "|---|---|---|",
    ]
    for method in block.multi:
        runs = [run for run in block.runs[method].values() if not run["diverged"]]
        if runs:
            curves = {task: [v for run in runs for v in run["norms"][task]["curve"]] for task in TASKS}
            medians = " / ".join(f"{statistics.median(curve):.2g}" for curve in curves.values())
            below = " / ".join(_percent(statistics.fmean(v < 0.1 for v in curve)) for curve in curves.values())
            lines.append(f"| {method} | {medians} | {below} |")
    return lines if len(lines) > 2 else []


TITLES = {
    ("composed", "adamw"): "Composed scenes, AdamW",
    ("composed", "sgd"): "Composed scenes, SGD with momentum 0.9",
    ("native", "adamw"): "Detection on aerial photos of trees (DeepForest), the other tasks as above, AdamW",
}


def report(records: Records, blocks: Sequence[tuple[str, str]]) -> str:
    """All tables of the blocks, in Markdown; says what is missing."""
    lines: list[str] = []
    for data, optimizer in blocks:
        block = Block(records, data, optimizer)
        missing, whole = block.missing()
        lines += [f"### {TITLES[data, optimizer]}", ""]
        lines += [
            f"{whole - missing} of {whole} runs are done" + (f"; **{missing} are missing**." if missing else "."),
            "",
        ]
        if missing == whole:
            continue
        weights = records.static_weights(data, optimizer) if "static" in block.methods else None
        if any(block.runs.values()):
            lines += [*results_table(block), "", *tests_table(block)]
            norms = norms_table(block)
            lines += [*norms, ""] if norms else []
        if weights:
            lines += [
                "Static weights: " + ", ".join(f"{task} {weight:g}" for task, weight in weights.items()) + ".",
                "",
            ]
        lines += [f"Learning rates (seed {CHOICE_SEED}):", "", *rates_table(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_page(page: Path, text: str) -> None:
    """Put a report between the two marks of a page.

    Raises:
        SystemExit: the page lacks the marks.
    """
    content = page.read_text()
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{page}: no lines '{BEGIN}' and '{END}' to write between")
    head, tail = content[: content.index(BEGIN)], content[content.index(END) :]
    page.write_text(f"{head}{BEGIN}\n\n{text}\n{tail}")


# ---- plots ----


def write_plots(records: Records, folder: Path) -> None:
    """Draw evidence-OPTIMIZER.png (scores by method and seed) and evidence-norms.png (norms and shares)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    for data, optimizer in BLOCKS:
        block = Block(records, data, optimizer)
        if any(block.runs[method] for method in block.multi):
            figure = _scores(plt, block)
            figure.savefig(folder / f"evidence-{data}-{optimizer}.png", dpi=110)
            plt.close(figure)
    block = Block(records, "composed", "adamw")
    if all(block.runs[method] for method in ("sum", REFERENCE)):
        figure = _norms(plt, block)
        figure.savefig(folder / "evidence-norms.png", dpi=110)
        plt.close(figure)


def _scores(plt: Any, block: Block) -> Any:
    figure, axes = plt.subplots(1, len(TASKS) + 1, figsize=(14, 0.45 * len(block.multi) + 1.6), sharey=True)
    order = list(reversed(block.multi))
    for axis, task in zip(axes, TASKS, strict=False):
        for row, method in enumerate(order):
            _row(axis, row, [run["metrics"][task] for run in block.runs[method].values()])
        name = f"single_{task}"
        alone = [run["metrics"][task] for run in block.runs.get(name, {}).values()]
        if alone:
            axis.axvline(statistics.fmean(alone), color="#444444", linewidth=1, linestyle="--", label="single-task")
            axis.legend(frameon=False, fontsize=8)
        axis.set_title(f"{task}, {METRICS[task]}", fontsize=10, loc="left")
    for row, method in enumerate(order):
        _row(axes[-1], row, [100 * value for value in block.change(method).values()])
    axes[-1].axvline(0, color="#444444", linewidth=1, linestyle="--")
    axes[-1].set_title("mean relative change, %", fontsize=10, loc="left")
    axes[0].set_yticks(range(len(order)), order)
    figure.tight_layout()
    return figure


def _row(axis: Any, row: int, values: Sequence[float]) -> None:
    axis.plot(values, [row] * len(values), "o", color="#3366aa", alpha=0.45, markersize=5)
    if values:
        axis.plot([statistics.fmean(values)], [row], "|", color="#cc6633", markersize=16, markeredgewidth=2)


def _norms(plt: Any, block: Block) -> Any:
    colors = dict(zip(TASKS, ("#3366aa", "#cc6633", "#2f8f4e"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6))
    for axis, method in zip(axes, ("sum", REFERENCE), strict=False):
        run = next(iter(block.runs[method].values()))
        for task in TASKS:
            curve = run["norms"][task]["curve"]
            steps = [run["logging_steps"] * (i + 1) for i in range(len(curve))]
            axis.plot(steps, curve, color=colors[task], label=task, linewidth=1.4)
            axis.plot(steps, run["scaled"][task], color=colors[task], linewidth=1.2, linestyle=":")
        axis.set_yscale("log")
        axis.set_xlabel("optimizer step")
        axis.set_title(f"{method}: backbone norm, raw (line) and as used (dots)", fontsize=10, loc="left")
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].set_ylim(axes[0].get_ylim()[0] / 3, None)
    methods = [m for m in block.multi if any(not run["diverged"] for run in block.runs[m].values())]
    left = [0.0] * len(methods)
    for task in TASKS:
        part = [
            statistics.fmean(r["shares"][task] for r in block.runs[m].values() if not r["diverged"]) for m in methods
        ]
        axes[2].barh(methods, part, left=left, color=colors[task])
        left = [a + b for a, b in zip(left, part, strict=True)]
    axes[2].invert_yaxis()
    axes[2].set_title("share of the backbone's squared gradient", fontsize=10, loc="left")
    figure.tight_layout()
    return figure
