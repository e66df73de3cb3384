"""Progress and metrics as short text. Quick to import."""

from __future__ import annotations

from typing import Any

_MOST = 12
"""Tasks that a line shows one by one."""


def task_losses(logs: dict[str, Any]) -> dict[str, float]:
    """Return task -> loss of one log; a missing value is NaN."""
    return {
        key.removeprefix("loss/"): float("nan") if value is None else value
        for key, value in logs.items()
        if key.startswith("loss/")
    }


def losses_line(logs: dict[str, Any], digits: int = 2) -> str:
    """Return the losses of one log as a line of text; of many tasks their number, mean and extremes.

    Example:
        >>> losses_line({"loss/det": 2.5, "loss/seg": 1.0, "epoch/det": 3.0})
        'det 2.50  seg 1.00'
        >>> losses_line({f"loss/t{number}": float(number) for number in range(40)})
        '40 tasks, mean 19.50, from t0 0.00 to t39 39.00'
    """
    losses = task_losses(logs)
    if len(losses) <= _MOST:
        return "  ".join(f"{name} {value:.{digits}f}" for name, value in losses.items())
    known = {name: value for name, value in losses.items() if value == value} or losses
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    missing = f", {len(losses) - len(known)} not finite" if len(known) < len(losses) else ""
    mean = sum(known.values()) / len(known)
    ends = f"from {low} {known[low]:.{digits}f} to {high} {known[high]:.{digits}f}"
    return f"{len(losses)} tasks{missing}, mean {mean:.{digits}f}, {ends}"


def metrics_line(logs: dict[str, Any]) -> str:
    """Return the metrics of one log as a line of text, under their flat names, without counts and values per class.

    Example:
        >>> metrics_line({"eval_det_map50": 0.25, "eval_det_samples": 9, "eval_score": 0.25, "eval_runtime": 2.0})
        'det_map50 0.250  score 0.250'
    """
    shown = {
        key.removeprefix("eval_"): value
        for key, value in logs.items()
        if key.startswith("eval_") and key != "eval_runtime" and "_class/" not in key and isinstance(value, float)
    }
    if len(shown) > 2 * _MOST and "score" in shown:
        return f"score {shown['score']:.3f}, and {len(shown) - 1} metrics of tasks in log.jsonl and the report"
    return "  ".join(f"{key} {value:.3f}" for key, value in shown.items())


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
