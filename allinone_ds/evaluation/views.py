"""Predictions of one batch, from its images as they are or from several views of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allinone_ds.data.augmentation.transforms import eval_transform, stack_images
from allinone_ds.data.loading.task_data import Joint
from allinone_ds.tasks import Prediction, Sample, Task
from allinone_ds.tasks.test_time import TestTime, View, view_sizes, window_corners


@torch.no_grad()
def predict_batch(
    model: nn.Module,
    task: Task,
    pixel_values: Tensor,
    samples: Sequence[Sample],
    test_time: TestTime | None = None,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
) -> list[Prediction]:
    """Return a task's predictions for the samples of a batch.

    The number of forwards depends on the options only, as ZeRO-3 requires: ranks with different images, or with none,
    run the same number.

    Args:
        model: an AllInOneModel, or the DeepSpeed engine around it, in evaluation mode.
        task: one of its tasks.
        pixel_values: (B, 3, H, W), the images at the network's input size, on the model's device.
        samples: the same images as they were read; fewer than B, or none, when `pixel_values` is padded with images
            that are not evaluated.
        test_time: the views to predict; None: `pixel_values` only.
        around: returns a context for each forward, given the task's name.

    Raises:
        ConfigError: the task cannot merge views.

    Example::

        task = model.tasks["seg"]
        pixels = task.collate(samples)["pixel_values"]
        masks = predict_batch(model, task, pixels, samples, TestTime(scales=[1.0, 1.5], flip=True))
    """

    def forward(pixels: Tensor) -> Any:
        with around(task.name) if around else nullcontext():
            return model(task=task.name, pixel_values=pixels)

    sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
    if test_time is None:
        outputs = forward(pixel_values)
        return task.predict(outputs, sizes) if samples else []
    task.check_test_time(test_time)
    views = []
    for size, window in view_sizes(test_time, task.image_size, task.size_multiple):
        corners = window_corners(size, window)
        resized = _at_size(pixel_values, samples, size)
        for flipped in (False, True) if test_time.flip else (False,):
            view = resized.flip(-1) if flipped else resized
            with task.at_size(window):
                outputs = [forward(view[..., top : top + window[0], left : left + window[1]]) for top, left in corners]
            views.append(View(size, flipped, outputs, corners))
    return task.predict_views(views, sizes) if samples else []


@torch.no_grad()
def predict_group(
    model: nn.Module,
    name: str,
    tasks: Sequence[Task],
    pixel_values: Tensor,
    samples: Sequence[Sample],
    joint: Joint,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
) -> dict[str, list[Prediction]]:
    """Return task -> its predictions for the samples of a batch, from one forward for all tasks without views.

    Args:
        model, pixel_values, samples, around: as in `predict_batch`.
        name: the joint group.
        tasks: its tasks.
        joint: its settings, which name the views that a task predicts.
    """
    plain = [task for task in tasks if task.name not in joint.test_time]
    outputs: Any = {}
    if plain:
        with around(name) if around else nullcontext():
            outputs = model(task=[task.name for task in plain], pixel_values=pixel_values)
    sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
    found: dict[str, list[Prediction]] = {}
    for task in tasks:
        views = joint.test_time.get(task.name)
        if views is not None:
            found[task.name] = predict_batch(model, task, pixel_values, samples, views, around)
        else:
            found[task.name] = task.predict(outputs[task.name], sizes) if samples else []
    return found


def _at_size(pixel_values: Tensor, samples: Sequence[Sample], size: tuple[int, int]) -> Tensor:
    """Return the images at a different input size (h, w), (B, 3, h, w), resized from the original pixels."""
    if tuple(pixel_values.shape[-2:]) == size:
        return pixel_values
    if not samples:  # only padding, whose predictions are not used
        return F.interpolate(pixel_values.float(), size=size, mode="bilinear", align_corners=False)
    transform = eval_transform(size)
    return stack_images([transform({"image": sample["image"]}) for sample in samples]).to(pixel_values.device)
