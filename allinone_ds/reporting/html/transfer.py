"""The section of a report about the gain over single-task models."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from allinone_ds.evaluation.transfer import Transfer, read_transfer
from allinone_ds.reporting.html.page import table
from allinone_ds.reporting.run_history import Run
from allinone_ds.reporting.tables import percent


def transfer_section(runs: Sequence[Run]) -> str:
    """Return the comparison with single-task models for every run that has one, as HTML; "" without any."""
    found = [(run, read_transfer(run.folder)) for run in runs]
    parts = [_comparison(run.label if len(runs) > 1 else "", of_run) for run, of_run in found if of_run is not None]
    return "<h2>Gain over single-task models</h2>" + "".join(parts) if parts else ""


def _comparison(label: str, transfer: Transfer) -> str:
    rows = []
    for row in transfer.rows:
        better = "larger" if row.greater_is_better else "smaller"
        cells = [f"{v:.4g} ({percent(gain)})" for v, gain in zip(row.values, row.gains, strict=True)]
        rows.append([row.task, row.metric, better, f"{row.baseline:.4g}", *cells])
    rows.append(["mean gain (Delta m)", "", "", "", *map(percent, transfer.mean_gains)])
    if len(transfer.runs) > 1:
        rows.append(["mean rank, 1 is best", "", "", "", *(f"{rank:.2f}" for rank in transfer.mean_ranks)])
    head = ["task", "metric", "better", "alone", *transfer.runs]
    lines = [
        f"{name}: worse than alone: {', '.join(transfer.worse(run)) or 'no task'}"
        for run, name in enumerate(transfer.runs)
    ]
    title = f"<h3>{escape(label)}</h3>" if label else ""
    return title + table(head, rows) + "".join(f"<p>{escape(line)}</p>" for line in [*lines, *transfer.notes])
