"""Progress and metrics as short text. Quick to import."""

from __future__ import annotations

from typing import Any


def task_losses(logs: dict[str, Any]) -> dict[str, float]:
    """{task: loss} out of one log."""
    return {
        key.removeprefix("loss/"): float("nan") if value is None else value
        for key, value in logs.items()
        if key.startswith("loss/")
    }


def metrics_line(logs: dict[str, Any]) -> str:
    """Evaluation metrics in one line of text."""
    skip = ("_samples", "_runtime")
    return "  ".join(
        f"{key.removeprefix('eval_')} {value:.3f}"
        for key, value in logs.items()
        if key.startswith("eval_") and not key.endswith(skip) and isinstance(value, float)
    )


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
