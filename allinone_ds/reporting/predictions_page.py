"""Predictions drawn on test images: pictures and one self-contained page of HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.data.loader import TaskData
from allinone_ds.errors import BrokenSample
from allinone_ds.evaluation.evaluate import tasks_of, to_device
from allinone_ds.run_folder.names import PAGE_FILE, PICTURES
from allinone_ds.tasks.drawing import to_pil

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; }
.pictures img { border-radius: 4px; max-width: calc(50% - 5px); height: auto; }
.note { color: #666; }
"""


@torch.no_grad()
def collect_drawings(
    model: Any, data: Mapping[str, TaskData], device: torch.device, count: int, draw: bool
) -> dict[str, list[Tensor]]:
    """Predictions of every task drawn on its first test images. Every rank calls it with the same arguments but `draw`.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it.
        data: test data by task.
        device: where the model is.
        count: images a task; unreadable ones are left out.
        draw: whether this rank draws; the others only run the model, which ZeRO-3 needs.

    Returns:
        Pictures by task, each uint8 (3, H, W).
    """
    model.eval()
    tasks = tasks_of(model)
    pictures: dict[str, list[Tensor]] = {}
    for name, part in data.items():
        samples = readable(part, count)
        if not samples:
            continue
        batch = part.collate([part.transform(sample) for sample in samples])
        outputs = model(task=name, pixel_values=to_device(batch["pixel_values"], device))
        if draw:
            sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
            predictions = tasks[name].predict(outputs, sizes)
            pictures[name] = [
                tasks[name].draw(sample["image"], prediction, sample)
                for sample, prediction in zip(samples, predictions, strict=True)
            ]
    return pictures


def readable(part: TaskData, count: int) -> list[dict[str, Any]]:
    """The first `count` samples that can be read."""
    samples: list[dict[str, Any]] = []
    for index in range(len(part.dataset)):
        if len(samples) == count:
            break
        try:
            samples.append(part.dataset[index])
        except BrokenSample:
            continue
    return samples


def write_page(
    pictures: Mapping[str, list[Tensor]], folder: str | Path, title: str, metrics: Mapping[str, Any]
) -> Path:
    """Write predictions/TASK-NN.png and predictions.html, which holds the same pictures within itself.

    Args:
        pictures: by task, each uint8 (3, H, W).
        folder: the run's.
        title: heading of the page.
        metrics: evaluation metrics, named eval_TASK_METRIC.
    """
    folder = Path(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if "eval_score" in metrics:
        parts.append(f"<p>score {metrics['eval_score']:.3f}, the mean of the tasks' main metrics on the test data</p>")
    for task, images in pictures.items():
        start = f"eval_{task}_"
        values = {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start)}
        figures = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v} {k}" for k, v in values.items())
        parts.append(f'<h2>{html.escape(task)}</h2><p class="note">{html.escape(figures)}</p><div class="pictures">')
        for number, picture in enumerate(images):
            data = io.BytesIO()
            to_pil(picture).save(data, "png")
            (folder / PICTURES / f"{task}-{number:02}.png").write_bytes(data.getvalue())
            code = base64.b64encode(data.getvalue()).decode()
            parts.append(f'<img alt="{html.escape(task)} {number}" src="data:image/png;base64,{code}">')
        parts.append("</div>")
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    target = folder / PAGE_FILE
    target.write_text(f"{page}\n<style>{STYLE}</style>\n{body}\n</html>\n")
    return target
