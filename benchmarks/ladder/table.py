"""The results of the ladder's records, as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ladder.plan import ABSOLUTE, BLOCKS, CHOICE_SEED, METHODS, SEEDS, SINGLE, TASKS_OF, Spec
from benchmarks.ladder.records import Records
from benchmarks.ladder.stats import ALPHA, compare, holm, relative_change

METRICS = {
    "detection": "mAP50", "segmentation": "mIoU", "classification": "top-1", "depth": "delta1", "edges": "ODS",
    "saliency": "max F", "keypoints": "OKS mAP50", "attributes": "mAP", "count": "R2",
}  # fmt: skip
BEGIN, END = "<!-- written by benchmarks.ladder: begin -->", "<!-- written by benchmarks.ladder: end -->"
REFERENCE = "tbgc"

# ---- a block of records ----


class Block:
    """The test records of one data set and optimizer.

    Args:
        records: of a size.
        data: of the block.
        optimizer: of the block.
    """

    def __init__(self, records: Records, data: str, optimizer: str):
        self.records, self.data, self.optimizer = records, data, optimizer
        self.methods = BLOCKS[data, optimizer]
        self.tasks, self.seeds = list(TASKS_OF[data]), SEEDS[data]
        self.short = " / ".join(task[:3] for task in self.tasks)
        self.multi = [method for method in self.methods if method in METHODS]
        self.runs: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in self.methods}
        for method in self.methods:
            lr = records.chosen(data, optimizer, method)
            for seed in self.seeds if lr is not None else ():
                record = records.read(Spec(data, optimizer, method, lr, seed, "test"))
                if record is not None:
                    self.runs[method][seed] = record
        self.single: dict[int, dict[str, float]] = {}  # by seed, for seeds with all single-task models
        names = [method for method in self.methods if method in SINGLE]
        alone = " and ".join(METRICS[SINGLE[name]] for name in names)
        self.measure = "mean relative change" if len(names) == len(self.tasks) else f"relative change of {alone}"
        for seed in self.seeds:
            found = {SINGLE[n]: self.runs[n][seed]["metrics"][SINGLE[n]] for n in names if seed in self.runs[n]}
            defined = all(score > 0 for task, score in found.items() if task not in ABSOLUTE)  # relative to 0 it is not
            if len(found) == len(names) and defined:
                self.single[seed] = found

    def choices(self, method: str) -> list[tuple[float, dict[str, Any] | None]]:
        """Return (learning rate, validation record) of a method, in rising order."""
        return [(s.lr, self.records.read(s)) for s in self.records.choice(self.data, self.optimizer, method)]

    def chosen_run(self, method: str) -> dict[str, Any] | None:
        """Return the validation record at the chosen rate; None if there is none or it diverged."""
        lr = self.records.chosen(self.data, self.optimizer, method)
        record = next((record for rate, record in self.choices(method) if rate == lr), None)
        return None if record is None or record["diverged"] else record

    def change(self, method: str) -> dict[int, float]:
        """Return the mean relative change against the single-task models, by seed."""
        runs = self.runs[method]
        return {s: relative_change(runs[s]["metrics"], self.single[s], ABSOLUTE) for s in runs if s in self.single}

    def mean_ranks(self) -> dict[str, str]:
        """Return every method's rank by a task's metric, 1 the best, as a mean over tasks and seeds that all have."""
        shared = [seed for seed in self.seeds if all(seed in self.runs[method] for method in self.multi)]
        ranks: dict[str, list[int]] = {method: [] for method in self.multi}
        for seed in shared:
            for task in self.tasks:
                scores = {method: self.runs[method][seed]["metrics"][task] for method in self.multi}
                for method, score in scores.items():
                    ranks[method].append(1 + sum(other > score for other in scores.values()))
        return {method: f"{statistics.fmean(found):.1f}" for method, found in ranks.items() if found}

    def missing(self) -> tuple[int, int]:
        """Return the number of missing runs and of all runs."""
        chosen = sum(record is None for method in self.methods for _, record in self.choices(method))
        seeds = sum(len(self.seeds) - len(runs) for runs in self.runs.values())
        total = sum(len(self.records.rates(self.optimizer, method)) + len(self.seeds) for method in self.methods)
        return chosen + seeds, total


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Return "mean ± sample standard deviation", or the mean alone of a single value."""
    if not values:
        return "missing"
    deviation = f" ± {form(statistics.stdev(values)).removeprefix('+')}" if len(values) > 1 else ""
    return form(statistics.fmean(values)) + deviation


def _three(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _p(value: float) -> str:
    return "below .001" if value < 0.001 else _three(value)


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


# ---- the report, as lines of Markdown ----


def rates_table(block: Block) -> list[str]:
    """Return the validation score of every method at every rate; the chosen one is bold."""
    lines = ["| method | rate: score on validation (chosen in bold) | the best is |", "|---|---|---|"]
    for method in block.methods:
        found = block.choices(method)
        best = block.records.chosen(block.data, block.optimizer, method)
        cells = []
        for lr, record in found:
            score = "missing" if record is None else _three(statistics.fmean(record["metrics"].values()))
            score = "diverged" if record is not None and record["diverged"] else score
            cells.append(f"**{lr:g}: {score}**" if lr == best else f"{lr:g}: {score}")
        order = block.records.rates(block.optimizer, method)
        ends = {None: "not known", order[0]: "the lowest tried", order[-1]: "the highest tried"}
        place = ends.get(best, "inside")
        lines.append(f"| {method} | {' · '.join(cells)} | {place} |")
    return lines


def results_table(block: Block) -> list[str]:
    """Return the test metrics, mean relative change, parts of the update and times of every method."""
    names = [
        "method", "seeds", *(METRICS[task] for task in block.tasks), f"{block.measure}, %", "mean rank",
        f"share of the gradient {block.short}, %", "wall s", "CPU s",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    ranks = block.mean_ranks()
    singles = [method for method in block.methods if method in SINGLE]
    if singles:
        cells = dict.fromkeys(block.tasks, "")
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
            f"| single-task models | {seeds} | {' | '.join(cells.values())} | 0 | | | {times[0]:.0f} | {times[1]:.0f} |"
        )
    for method in block.multi:
        runs = list(block.runs[method].values())
        cells = {task: spread([run["metrics"][task] for run in runs], _three) for task in block.tasks}
        stable = [run for run in runs if not run["diverged"]]
        parts = [_percent(statistics.fmean(run["shares"][task] for run in stable)) for task in block.tasks if stable]
        share = " / ".join(parts)
        seconds = [
            f"{statistics.fmean(run[key] for run in runs):.0f}" if runs else ""
            for key in ("wall_seconds", "cpu_seconds")
        ]
        change = spread(list(block.change(method).values()), _signed)
        row = [method, str(len(runs)), *cells.values(), change, ranks.get(method, ""), share, *seconds]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def tests_table(block: Block) -> list[str]:
    """Return paired tests over seeds: four families, each with Holm's correction."""
    families = {
        f"Every method against the plain sum, {block.measure} in percentage points": {
            f"{method} - sum": values for method, values in against_sum(block).items()
        },
        f"{REFERENCE} against the other methods, {block.measure} in percentage points": {
            f"{REFERENCE} - {method}": _paired(block.change(REFERENCE), block.change(method))
            for method in block.multi
            if method not in (REFERENCE, "sum")
        },
    }
    families[f"Every method against single-task models, {block.measure} in percentage points"] = {
        f"{method} - single-task": list(block.change(method).values()) for method in block.multi
    }
    families[f"{REFERENCE} against the plain sum, task by task, metric in hundredths"] = {
        f"{METRICS[task]}: {REFERENCE} - sum": _paired(
            *({s: run["metrics"][task] for s, run in block.runs[m].items()} for m in (REFERENCE, "sum"))
        )
        for task in block.tasks
    }
    lines = []
    for title, family in families.items():
        if not family:
            continue
        tested = {name: compare(values) for name, values in family.items() if len(values) > 1}
        adjusted = dict(zip(tested, holm([c.p for c in tested.values()]), strict=True))
        lines += [f"**{title}:**", ""]
        lines += ["| difference | seeds | mean | 95 % interval | p | p, Holm | verdict | 80 % power from |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, values in family.items():
            if name not in tested:
                lines.append(f"| {name} | {len(values)} | | | | | not enough seeds yet | |")
                continue
            c = tested[name]
            verdict = "significant" if adjusted[name] < ALPHA else "not significant"
            if c.n < len(block.seeds):
                verdict = f"preliminary: {verdict}"
            lines.append(
                f"| {name} | {c.n} | {_signed(c.mean)} | {_signed(c.low)} to {_signed(c.high)} | {_p(c.p)} "
                f"| {_p(adjusted[name])} | {verdict} | {_percent(c.detectable)} |"
            )
        lines.append("")
    return lines


def against_sum(block: Block) -> dict[str, list[float]]:
    """Return every method's mean relative change less that of the plain sum, one value per seed that both have."""
    return {m: _paired(block.change(m), block.change("sum")) for m in block.multi if m != "sum"}


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def norms_table(block: Block) -> list[str]:
    """Return median raw backbone norms and how often they were below the clip, from runs at the chosen rate."""
    lines = [
        f"| method | median raw norm {block.short} | windows of steps with a norm below 0.1, % |",
        "|---|---|---|",
    ]
    for method in block.multi:
        runs = [run for run in block.runs[method].values() if not run["diverged"]]
        if runs:
            curves = {task: [v for run in runs for v in run["norms"][task]["curve"]] for task in block.tasks}
            medians = " / ".join(f"{statistics.median(curve):.2g}" for curve in curves.values())
            below = " / ".join(_percent(statistics.fmean(v < 0.1 for v in curve)) for curve in curves.values())
            lines.append(f"| {method} | {medians} | {below} |")
    return lines if len(lines) > 2 else []


def updates_table(block: Block) -> list[str]:
    """Return every task's part of the gradient and of the update of the backbone, from one run of each method."""
    lines = [
        f"| method | part of the squared gradient {block.short}, % | of the squared update, % | of the way, % |",
        "|---|---|---|---|",
    ]
    for method in block.multi:
        run = block.runs[method].get(block.seeds[0], {})
        if "update" in run:
            parts = (run["shares"], run["update"]["squared"], run["update"]["along"])
            cells = [" / ".join(_percent(part[task]) for task in block.tasks) for part in parts]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def earlier_table(block: Block, earlier: Block) -> list[str]:
    """Return the results with the earlier segmentation head beside those of today, for methods that have both."""
    if earlier.records.settings(block.data) == block.records.settings(block.data):
        return []  # trained with the head of today only
    names = ["method", *(METRICS[task] for task in block.tasks), f"{block.measure}, %"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method in block.multi:
        if not block.runs[method] or not earlier.runs[method]:
            continue
        cells = [f"{_mean_score(earlier, method, task)} to {_mean_score(block, method, task)}" for task in block.tasks]
        changes = [list(one.change(method).values()) for one in (earlier, block)]
        cells.append(" to ".join(_signed(statistics.fmean(values)) if values else "missing" for values in changes))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _mean_score(block: Block, method: str, task: str) -> str:
    return _three(statistics.fmean(run["metrics"][task] for run in block.runs[method].values()))


TITLES = {
    ("composed", "adamw"): "Composed scenes, AdamW",
    ("composed", "sgd"): "Composed scenes, SGD with momentum 0.9",
    ("composed", "muon"): "Composed scenes, Muon for the backbone's matrices",
    ("joint", "adamw"): "Eight tasks on one set of images, AdamW",
    ("native", "adamw"): "Detection on aerial photos of trees (DeepForest), the other tasks as above, AdamW",
}


def report(records: Records, blocks: Sequence[tuple[str, str]]) -> str:
    """Return all tables of the blocks in Markdown, and how many runs are missing."""
    lines: list[str] = []
    for data, optimizer in blocks:
        block = Block(records, data, optimizer)
        missing, total = block.missing()
        lines += [f"### {TITLES[data, optimizer]}", ""]
        lines += [
            f"{total - missing} of {total} runs are done" + (f"; **{missing} are missing**." if missing else "."),
            "",
        ]
        if missing == total:
            continue
        weights = records.static_weights(data, optimizer) if "static" in block.methods else None
        if any(block.runs.values()):
            lines += [*results_table(block), "", *tests_table(block)]
            norms = norms_table(block)
            lines += [*norms, ""] if norms else []
            updates = updates_table(block)
            lines += [f"Seed {block.seeds[0]}, what AdamW makes of the gradients:", "", *updates, ""] if updates else []
            earlier = earlier_table(block, Block(records.earlier(), data, optimizer))
            if earlier:
                lines += ["With a segmentation head that starts from a bias of zero, to the head of today:", ""]
                lines += [*earlier, ""]
        if weights:
            lines += [
                "Static weights: " + ", ".join(f"{task} {weight:g}" for task, weight in weights.items()) + ".",
                "",
            ]
        lines += [f"Learning rates (seed {CHOICE_SEED}):", "", *rates_table(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_page(page: Path, text: str) -> None:
    """Write a report between the two marks of a page.

    Raises:
        SystemExit: the page does not have the marks.
    """
    content = page.read_text()
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{page} does not have the lines '{BEGIN}' and '{END}', between which the tables belong")
    head, tail = content[: content.index(BEGIN)], content[content.index(END) :]
    page.write_text(f"{head}{BEGIN}\n\n{text}\n{tail}")
