"""Tables that commands print. Quick to import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def metrics_table(metrics: dict[str, Any], title: str) -> Table:
    """Every task's metrics, and the score.

    Args:
        metrics: named eval_TASK_METRIC, eval_TASK_samples and eval_score.
        title: above the table.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("samples", justify="right")
    for name in [k.removeprefix("eval_").removesuffix("_samples") for k in metrics if k.endswith("_samples")]:
        start = f"eval_{name}_"
        for key, value in metrics.items():
            if key.startswith(start) and not key.endswith(("_samples", "_broken")):
                table.add_row(name, key.removeprefix(start), f"{value:.3f}", str(metrics[f"{start}samples"]))
    if "eval_score" in metrics:
        table.add_row("score", "mean of main metrics", f"{metrics['eval_score']:.3f}", "", style="bold")
    return table


def plan_tables(plan: Any, config: str) -> Iterator[str | Table]:
    """What a run needs of each GPU: memory by part, messages by kind, and the same run under other settings.

    Args:
        plan: a `training.plan.Plan`.
        config: how the run's file is called.
    """
    where = f"{config} on {plan.gpus} GPUs, ZeRO-{plan.stage}, norm={plan.norm}"
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items() if count)
    yield f"parameters: {sizes}"
    yield _bytes_table(plan.memory, f"{where}: memory of a GPU")
    if plan.host:
        yield _bytes_table(plan.host, "memory of the host for each GPU")
    yield _bytes_table(plan.activations, "activations of a micro-step by task", total=False)
    yield _bytes_table(plan.moved, "sent by a GPU in an optimizer step")
    table = Table(title="the same run otherwise", title_justify="left", box=None, pad_edge=False)
    for column in ("ZeRO", "norm", "memory GiB", "sent GiB"):
        table.add_column(column, justify="right" if "GiB" in column else "left")
    for row in plan.choices:
        mine = (row["stage"], row["norm"]) == (plan.stage, plan.norm)
        cells = (str(row["stage"]), row["norm"], _gib(row["memory"]), _gib(row["moved"]))
        table.add_row(*cells, style="bold" if mine else None)
    yield table


def _bytes_table(parts: dict[str, int], title: str, total: bool = True) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, count in parts.items():
        table.add_row(name, _gib(count))
    if total:
        table.add_row("in all", _gib(sum(parts.values())), style="bold")
    return table


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f}"
