"""Plots show every task."""

from __future__ import annotations

from pathlib import Path

from allinone_ds.reporting.plots import series, write_plots


def test_plots_show_every_task(tmp_path: Path) -> None:
    history = [
        {"step": s, "loss/a": 1.0 / s, "grad_norm/a/raw": s, "grad_norm/a/scale": 0.1 / s, "grad_norm/a/scaled": 0.1}
        for s in (1, 2)
    ] + [{"step": 2, "eval_a_map": 0.5, "eval_a_samples": 3, "eval_score": 0.5}]
    assert series(history, "grad_norm/", "/raw") == {"a": ([1, 2], [1, 2])}
    assert {path.name for path in write_plots(history, tmp_path)} == {"loss.png", "norms.png", "metrics.png"}
