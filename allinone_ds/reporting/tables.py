"""Tables that commands print. Quick to import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from allinone_ds.evaluation.metrics import Evaluation

if TYPE_CHECKING:
    from allinone_ds.evaluation.transfer import Transfer
    from allinone_ds.planning.plan import Plan


def metrics_table(
    evaluation: Evaluation, title: str, constants: Mapping[str, Mapping[str, float]] | None = None
) -> Table:
    """Return a table of every task's metrics and the score.

    Args:
        evaluation: the metrics.
        title: title of the table.
        constants: task -> metric -> value of a predictor that does not look at the image; None: no such column.

    Example:
        >>> metrics_table(Evaluation({"det": {"map50": 0.5, "samples": 9}}, score=0.5), "runs/demo").row_count
        2
    """
    table = _table(title, "task", "metric", right=("value", *(["constant"] if constants else []), "samples"))
    for task, values in evaluation.tasks.items():
        for metric, value in evaluation.metrics(task).items():
            constant = (constants or {}).get(task, {}).get(metric)
            beside = ["" if constant is None else f"{constant:.3f}"] if constants else []
            table.add_row(task, metric, f"{value:.3f}", *beside, str(values.get("samples", "")))
    if evaluation.score is not None:
        table.add_row("score", "mean of main metrics", f"{evaluation.score:.3f}", style="bold")
    return table


def plan_tables(plan: Plan, config: str) -> Iterator[str | Table]:
    """Yield what a run needs of each GPU: memory by part, bytes sent by purpose, and both with other settings.

    Args:
        plan: what `plan_run` returned.
        config: name of the run's file, for the titles.
    """
    where = f"{config} on {plan.gpus} GPUs, ZeRO-{plan.stage}, norm={plan.norm}"
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items() if count)
    yield f"parameters: {sizes}"
    yield _bytes_table(plan.memory, f"{where}: memory per GPU")
    if plan.host:
        yield _bytes_table(plan.host, "memory of the host per GPU")
    yield _bytes_table(plan.activations, "activations of one micro-step by task", total=False)
    yield _bytes_table(plan.moved, "sent per GPU and optimizer step")
    numbers = ("memory GiB", "sent GiB", "between nodes GiB")
    table = _table("the same run with other settings", "ZeRO", "norm", right=numbers)
    for row in plan.choices:
        planned = (row["stage"], row["norm"]) == (plan.stage, plan.norm)
        cells = (str(row["stage"]), row["norm"], *(_gib(row[key]) for key in ("memory", "moved", "between")))
        table.add_row(*cells, style="bold" if planned else None)
    yield table
    if not plan.savings:
        return
    left = ("copied within", "kept over the step")
    table = _table("the same run with other settings of its weights", *left, right=numbers)
    for saving in plan.savings:
        copied = f"{saving.within} GPUs" if saving.within > 1 else ""
        cells = (_gib(saving.memory), _gib(saving.moved), _gib(saving.between))
        style = "bold" if saving.recommended else None
        table.add_row(copied, f"{saving.kept / 1e6:,.0f} M", *cells, style=style)
    yield table
    for saving in plan.savings:
        if saving.recommended and saving.keys:
            yield f"recommended: deepspeed.zero_optimization: {dict(saving.keys)}"


def transfer_tables(transfer: Transfer) -> Iterator[str | Table]:
    """Yield the comparison of multi-task runs with single-task models: a table, and the tasks that got worse.

    Args:
        transfer: what `compare_runs` returned.
    """
    runs = range(len(transfer.runs))
    table = _table("gain over single-task models", "task", "metric", right=("alone", *transfer.runs))
    for row in transfer.rows:
        arrow = "\N{UPWARDS ARROW}" if row.greater_is_better else "\N{DOWNWARDS ARROW}"
        cells = (f"{v:.4g} {percent(gain):>8}" for v, gain in zip(row.values, row.gains, strict=True))
        table.add_row(row.task, f"{row.metric} {arrow}", f"{row.baseline:.4g}", *cells)
    table.add_row("mean gain", "Delta m", "", *map(percent, transfer.mean_gains), style="bold")
    if len(transfer.runs) > 1:
        table.add_row("mean rank", "1 is best", "", *(f"{rank:.2f}" for rank in transfer.mean_ranks))
    yield table
    for run in runs:
        yield f"{transfer.runs[run]}: worse than alone: {', '.join(transfer.worse(run)) or 'no task'}"


def percent(gain: float | None) -> str:
    """Return a gain with its sign.

    Example:
        >>> percent(2.345), percent(None)
        ('+2.3%', 'n/a')
    """
    return "n/a" if gain is None else f"{gain:+.1f}%"


def _bytes_table(parts: dict[str, int], title: str, total: bool = True) -> Table:
    table = _table(title, "part", right=("GiB",))
    for name, count in parts.items():
        table.add_row(name, _gib(count))
    if total:
        table.add_row("total", _gib(sum(parts.values())), style="bold")
    return table


def _table(title: str, *left: str, right: tuple[str, ...]) -> Table:
    """Return an empty table with columns of text, aligned to the left, and of numbers, aligned to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in (*left, *right):
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f}"
