"""Progress and metrics as short text. Quick to import."""

from __future__ import annotations

from typing import Any


def task_losses(logs: dict[str, Any]) -> dict[str, float]:
    """Return task -> loss of one log; a missing value is NaN."""
    return {
        key.removeprefix("loss/"): float("nan") if value is None else value
        for key, value in logs.items()
        if key.startswith("loss/")
    }


def metrics_line(logs: dict[str, Any]) -> str:
    """Return the metrics of one log as a line of text, under their flat names, without counts and values per class.

    Example:
        >>> metrics_line({"eval_det_map50": 0.25, "eval_det_samples": 9, "eval_score": 0.25, "eval_runtime": 2.0})
        'det_map50 0.250  score 0.250'
    """
    return "  ".join(
        f"{key.removeprefix('eval_')} {value:.3f}"
        for key, value in logs.items()
        if key.startswith("eval_") and key != "eval_runtime" and "_class/" not in key and isinstance(value, float)
    )


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
