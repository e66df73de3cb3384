"""Scores of the CVPR 2023 Foundation Model Challenge, track 1, and the file with the predictions that were scored.

Leaderboard A is the mean of top-1, mAP50 and mIoU on the test data. Leaderboard B is the mean of top-1 and mAP50 of the
same configuration, trained on other data of the same kinds.
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

from allinone_ds.data.joint.batches import by_task
from allinone_ds.errors import ConfigError
from allinone_ds.evaluation.evaluate import evaluate_task, tasks_of
from allinone_ds.evaluation.metrics import Evaluation
from allinone_ds.evaluation.predictor import default_device, load_run
from allinone_ds.evaluation.selection import score
from allinone_ds.run_config.build import open_test_data
from allinone_ds.run_folder.names import SUBMISSION
from allinone_ds.tasks import Prediction, Sample, Task

Leaderboard = Literal["A", "B"]
KINDS: dict[Leaderboard, dict[str, str]] = {
    "A": {"classification": "top1", "detection": "map50", "segmentation": "miou"},
    "B": {"classification": "top1", "detection": "map50"},
}
"""Leaderboard -> kind of task -> the metric that enters the score."""


def score_run(
    folder: str | Path,
    leaderboard: Leaderboard,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a run's model on its test data and write the predictions that were scored.

    Args:
        folder: folder of a run or of a checkpoint, with exactly one task of every kind that `KINDS` lists for the
            leaderboard. Each of these tasks has test data.
        leaderboard: "A" or "B".
        output: the file to write; None is submission_A.json or submission_B.json in `folder`.
        overrides: dotted keys that replace values of the run's configuration, for example
            ["tasks.seg.test_time.flip=true"].

    Returns:
        "leaderboard", "score" (0 to 1), "metrics" (task -> metric -> value), "file", the path of the file, and
        "warnings", what the user should know about the numbers.

    Raises:
        ConfigError: there are no weights, or a kind does not have exactly one task with test data.
        DataError: the test data cannot be read.

    Example::

        found = score_run("runs/demo", "A", overrides=["tasks.segmentation.test_time.flip=true"])
        found["score"], found["file"]
    """
    device = default_device()
    model, config = load_run(folder, device, overrides)
    tasks = tasks_of(model)
    chosen = _one_of_each(tasks, KINDS[leaderboard], {name for name, task in config.tasks.items() if task.test_source})
    data = by_task(open_test_data(config, {name: task.classes for name, task in tasks.items()}))
    metrics: dict[str, dict[str, float]] = {}
    details: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for kind, name in chosen.items():
        rows: list[dict[str, Any]] = []

        def keep(samples: Sequence[Sample], predictions: Sequence[Prediction], rows: list[Any] = rows) -> None:
            rows += [
                {"image": _relative_path(s, config.data_root), **_to_json(p)}
                for s, p in zip(samples, predictions, strict=True)
            ]

        metrics[name] = evaluate_task(model, name, data[name], device, record=keep, details=details)
        written[name] = {"kind": kind, "classes": tasks[name].classes, "predictions": rows}
    main = [metrics[name][metric] for name, metric in zip(chosen.values(), KINDS[leaderboard].values(), strict=True)]
    summary = {"leaderboard": leaderboard, "score": score(main), "metrics": metrics}
    target = Path(output) if output is not None else Path(folder) / SUBMISSION.format(leaderboard)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"version": 1, "run": config.name, **summary, "tasks": written}) + "\n")
    return {**summary, "file": str(target), "warnings": Evaluation(metrics, details=details).warnings}


def _one_of_each(tasks: dict[str, Task], kinds: dict[str, str], tested: set[str]) -> dict[str, str]:
    """Return kind -> name of its only task with test data."""
    chosen = {}
    for kind, metric in kinds.items():
        names = [name for name, task in tasks.items() if task.kind == kind and name in tested]
        if len(names) != 1:
            raise ConfigError(
                f"the leaderboard needs exactly one {kind} task with test data for its {metric}; this run has "
                f"{len(names)}{': ' + ', '.join(names) if names else ''}. Set or remove `test` of its tasks"
            )
        chosen[kind] = names[0]
    return chosen


def _relative_path(sample: Sample, root: Path) -> str:
    """Return the image's path, relative to `data_root` if it lies below it."""
    path = Path(sample["path"])
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _to_json(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as numbers and lists, a label map as a base64-encoded PNG."""
    plain: dict[str, Any] = {}
    for key, value in prediction.items():
        if key == "mask":
            file = io.BytesIO()
            Image.fromarray(value.cpu().numpy()).save(file, "png")
            plain["mask_png"] = base64.b64encode(file.getvalue()).decode()
        else:
            plain[key] = value.tolist() if isinstance(value, Tensor) else value
    return plain
