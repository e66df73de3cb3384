"""Predictions of a model drawn on test images, and their files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allinone_ds.data.joint.batches import by_task
from allinone_ds.data.joint.dataset import TaskView, view_of
from allinone_ds.data.loading.ahead import to_device
from allinone_ds.data.loading.task_data import TaskData
from allinone_ds.errors import BrokenSample
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.run_folder.names import PICTURES
from allinone_ds.tasks.drawing import sheet, to_pil


@torch.no_grad()
def collect_drawings(
    model: Any,
    data: Mapping[str, TaskData],
    device: torch.device,
    count: int,
    draw: bool,
    indices: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[Tensor]]:
    """Return predictions of every task drawn on its first test images, or on chosen ones. Collective.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it; left in evaluation mode.
        data: task or joint group -> test data.
        device: the model's device.
        count: images per task; unreadable ones are left out.
        draw: whether this rank draws. The other ranks only run the model, as ZeRO-3 requires.
        indices: task -> positions of the images to draw instead of the first ones, the same on every rank.

    Returns:
        task or joint group -> pictures, each uint8 (3, H, W); empty where `draw` is False.
    """
    model.eval()
    pictures: dict[str, list[Tensor]] = {}
    for name, part in data.items():
        if part.joint is None or indices is None:
            own = None if indices is None else indices.get(name, ())
            pictures |= _drawn(model, name, part, device, count, draw, own)
            continue
        views = by_task({name: part})
        for task, view in views.items():
            assert isinstance(view.dataset, TaskView)
            places = {row: place for place, row in enumerate(view.dataset.rows)}  # the positions are the group's
            own = [places[row] for row in indices.get(task, ()) if row in places]
            pictures |= _drawn(model, task, view, device, count, draw, own)
    return pictures


def _drawn(
    model: Any,
    name: str,
    part: TaskData,
    device: torch.device,
    count: int,
    draw: bool,
    chosen: Sequence[int] | None,
) -> dict[str, list[Tensor]]:
    """Return {task or joint group: pictures}; those of a group have the predictions of all its tasks side by side."""
    samples = _readable(part, range(len(part.dataset)) if chosen is None else chosen, count)
    if not samples:
        return {}
    known = tasks_of(model)
    names = [name] if part.joint is None else list(part.joint.tasks)
    batch = part.collate([part.transform(sample) for sample in samples])
    pixels = to_device(batch["pixel_values"], device)
    together = model(task=name if part.joint is None else names, pixel_values=pixels)
    outputs = {name: together} if part.joint is None else together
    if not draw:
        return {}
    sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
    predictions = {task: known[task].predict(outputs[task], sizes) for task in names}
    if part.joint is None:
        return {name: [known[name].draw(s["image"], p, s) for s, p in zip(samples, predictions[name], strict=True)]}
    drawn = []
    for place, sample in enumerate(samples):
        panels = {}
        for task in names:
            truth = view_of(sample, task) if task in sample["targets"] else None
            panels[task] = known[task].draw(sample["image"], predictions[task][place], truth)
        drawn.append(sheet(sample["image"], panels))
    return {name: drawn}


def worst_images(details: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return task -> positions of the images with the lowest scores, lowest first.

    Args:
        details: task -> details of an evaluation.
    """
    return {task: [image["index"] for image in found.get("worst", [])] for task, found in details.items()}


def _readable(part: TaskData, indices: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Return the first `count` samples at these positions that can be read."""
    samples: list[dict[str, Any]] = []
    for index in indices:
        if len(samples) == count:
            break
        try:
            samples.append(part.dataset[index])
        except BrokenSample:
            continue
    return samples


def save_pictures(pictures: Mapping[str, list[Tensor]], folder: str | Path, name: str = PICTURES) -> None:
    """Write predictions/TASK-NN.png, which the pages of a run show.

    Args:
        pictures: task -> pictures, each uint8 (3, H, W).
        folder: the run's folder.
        name: folder of the pictures in it.
    """
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    for task, drawn in pictures.items():
        for number, picture in enumerate(drawn):
            to_pil(picture).save(target / f"{task}-{number:02}.png")
