"""The challenge's leaderboards: one number for a run, and the file of predictions behind it.

CVPR 2023 Foundation Model Challenge, track 1. A is the mean of top-1, mAP50 and mIoU on the test data. B is the same
run trained on other data of the same kinds, of which detection and classification count.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import evaluate_task, score, tasks_of
from allinone_ds.evaluation.predictor import default_device, load_run
from allinone_ds.run_config.build import open_test_data
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_folder.names import SUBMISSION
from allinone_ds.tasks import Prediction, Sample, Task

Leaderboard = Literal["A", "B"]
KINDS: dict[Leaderboard, dict[str, str]] = {
    "A": {"classification": "top1", "detection": "map50", "segmentation": "miou"},
    "B": {"classification": "top1", "detection": "map50"},
}
"""Kinds of tasks that count, and the metric of each."""


def score_run(
    folder: str | Path,
    leaderboard: Leaderboard,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a run's model on its test data and write the predictions that were scored.

    Args:
        folder: of a run or of a checkpoint; it has exactly one task of every kind that counts, each with test data.
        leaderboard: which kinds count; the score is the mean of their metrics.
        output: the file; None is submission_A.json (or _B) in `folder`.
        overrides: dotted keys laid over its configuration, for example ["tasks.seg.test_time.flip=true"].

    Returns:
        What the file says of the score: leaderboard, score, and metrics by task; and "file".

    Raises:
        ConfigError: no weights, or not one task of every kind with test data.
        DataError: the test data cannot be read.
    """
    device = default_device()
    model, config = load_run(folder, device, overrides)
    _, facts = read_run_files(folder)
    tasks = tasks_of(model)
    chosen = _one_of_each(tasks, KINDS[leaderboard], {name for name, task in config.tasks.items() if task.test})
    data = open_test_data(config, facts.classes)
    metrics: dict[str, dict[str, float]] = {}
    written: dict[str, Any] = {}
    for kind, name in chosen.items():
        rows: list[dict[str, Any]] = []

        def keep(samples: Sequence[Sample], predictions: Sequence[Prediction], rows: list[Any] = rows) -> None:
            rows += [
                {"image": _place(s, config.data_root), **_plain(p)} for s, p in zip(samples, predictions, strict=True)
            ]

        metrics[name] = evaluate_task(model, name, data[name], device, record=keep)
        written[name] = {"kind": kind, "classes": tasks[name].classes, "predictions": rows}
    main = [metrics[name][metric] for name, metric in zip(chosen.values(), KINDS[leaderboard].values(), strict=True)]
    facts_of_score = {"leaderboard": leaderboard, "score": score(main), "metrics": metrics}
    target = Path(output) if output is not None else Path(folder) / SUBMISSION.format(leaderboard)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"version": 1, "run": config.name, **facts_of_score, "tasks": written}) + "\n")
    return {**facts_of_score, "file": str(target)}


def _one_of_each(tasks: dict[str, Task], kinds: dict[str, str], tested: set[str]) -> dict[str, str]:
    """Name of the task of each kind."""
    chosen = {}
    for kind, metric in kinds.items():
        names = [name for name, task in tasks.items() if task.kind == kind and name in tested]
        if len(names) != 1:
            raise ConfigError(
                f"the leaderboard needs exactly one {kind} task with test data for its {metric}; this run has "
                f"{len(names)}{': ' + ', '.join(names) if names else ''}"
            )
        chosen[kind] = names[0]
    return chosen


def _place(sample: Sample, root: Path) -> str:
    """The image's path, relative to `data_root` where it lies there."""
    path = Path(sample["path"])
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _plain(prediction: Prediction) -> dict[str, Any]:
    """A prediction in JSON's types: numbers and lists as they are, a label map as a png."""
    plain: dict[str, Any] = {}
    for key, value in prediction.items():
        if key == "mask":
            file = io.BytesIO()
            Image.fromarray(value.cpu().numpy()).save(file, "png")
            plain["mask_png"] = base64.b64encode(file.getvalue()).decode()
        else:
            plain[key] = value.tolist() if isinstance(value, Tensor) else value
    return plain
