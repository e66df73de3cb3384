"""Plots show every task."""

from __future__ import annotations

import math
import re
from pathlib import Path

from allinone_ds.reporting.plots import _thinned, evaluation_lines, series, svg, write_plots


def test_plots_show_every_task(tmp_path: Path) -> None:
    history = [
        {"step": s, "loss/a": 1.0 / s, "grad_norm/a/raw": s, "grad_norm/a/scale": 0.1 / s, "grad_norm/a/scaled": 0.1}
        for s in (1, 2)
    ] + [{"step": 2, "eval_a_map": 0.5, "eval_a_samples": 3, "eval_score": 0.5}]
    assert series(history, "grad_norm/", "/raw") == {"a": ([1, 2], [1, 2])}
    assert {path.name for path in write_plots(history, tmp_path)} == {"loss.png", "norms.png", "metrics.png"}


def test_the_names_of_many_tasks_are_below_the_plot() -> None:
    """And each line has a look of its own; a page shows the main metric of each of many tasks."""
    looks, heights = set(), []
    for count in (10, 40):
        text = svg({f"task{number:02}": ([1, 2], [1.0, 2.0]) for number in range(count)}, "loss")
        heights.append(float(re.search(r'height="([\d.]+)pt"', text)[1]))
        assert len(set(re.findall(r"<!-- (task\d\d) -->", text))) == count
        looks = set(re.findall(r'style="fill: none; (?:stroke-dasharray: [^;]+; [^;]+; )?stroke: #\w+', text))
    assert heights[1] > 1.2 * heights[0] and len(looks) >= 40
    names = [f"task{number}" for number in range(12)]
    entry = {"step": 1, "eval_score": 0.5} | {f"eval_{n}_{m}": 0.5 for n in names for m in ("map50", "map_small")}
    assert set(evaluation_lines([entry], names)) == {"score", *(f"{name}: map50" for name in names)}
    assert len(evaluation_lines([entry], names[:2])) == 5


def test_a_line_of_many_logs_stays_small_and_keeps_its_peaks() -> None:
    count = 100_000
    values = [1.0 + (step % 7) / 10 for step in range(count)]
    values[70_001], values[30_000], values[50_000] = 9.0, -5.0, math.nan
    steps, drawn = _thinned(range(count), values)
    assert len(steps) == len(drawn) <= 800 and list(steps) == sorted(steps)
    assert dict(zip(steps, drawn, strict=True))[70_001] == 9.0 and min(drawn) == -5.0
    assert _thinned([1, 2], [0.5, math.nan])[0] == [1, 2]
    assert len(svg({"a": (range(count), values)}, "loss")) < 60_000
