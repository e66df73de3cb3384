"""Metrics of predictors that do not look at the image: what a trained model has to beat."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from allinone_ds.atomic_file import write_atomically
from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.data.joint.batches import by_task
from allinone_ds.evaluation.evaluate import tasks_of
from allinone_ds.run_config.build import build_model, open_test_data, open_train_data
from allinone_ds.run_config.run_files import read_run_files
from allinone_ds.run_folder.names import CONSTANT_FILE
from allinone_ds.tasks import Prediction, Task

Constant = Callable[[Sample], Prediction]
"""Returns a prediction for an image of a sample's size that does not depend on its pixels."""
_LEARNED = 200  # training samples that constants are computed from


def write_constants(folder: Path) -> dict[str, dict[str, float]]:
    """Compute what constant predictors reach on the test data of a run, and write RUN/constant.json for its report.

    Args:
        folder: folder of the run.

    Returns:
        Task -> metric -> value, for the kinds of task that have such predictors.
    """
    config, facts = read_run_files(folder)
    tasks = tasks_of(build_model(config, facts))
    train, test = by_task(open_train_data(config)), by_task(open_test_data(config, facts.classes))
    found = {
        name: constant_metrics(tasks[name], train[name].dataset, part.dataset)
        for name, part in test.items()
        if tasks[name].kind in _CONSTANTS
    }
    write_atomically(folder / CONSTANT_FILE, json.dumps(found, indent=1) + "\n")
    return found


def constant_metrics(task: Task, train: SampleDataset, test: SampleDataset) -> dict[str, float]:
    """Return for each metric of known direction the best value that a constant prediction reaches on the test data.

    The constants: the most frequent class; the mean of numbers, points and normals, the median of depths; the mean
    frequency of attributes; everywhere 0 and everywhere 1 for edges and saliency; for objects, one box of the mean
    place and the most frequent class, with the mean points, or filled. Retrieval gets random embeddings.

    Args:
        task: a task of one of these kinds.
        train: training data.
        test: test data.

    Example:
        >>> from allinone_ds.tasks.vectors.regression import RegressionTask
        >>> task = RegressionTask("age", ["years"], channels=8, stride=4, num_levels=1, image_size=(16, 16))
        >>> samples = [{"value": torch.tensor([20.0])}, {"value": torch.tensor([40.0])}]
        >>> constant_metrics(task, samples, samples)["mae"]
        10.0
    """
    count = min(len(train), _LEARNED)
    learned = [train[place * len(train) // count] for place in range(count)]
    results: list[dict[str, float]] = []
    for constant in _CONSTANTS[task.kind](task, learned):
        metric = task.metric()
        for index in range(len(test)):
            sample = test[index]
            metric.update([constant(sample)], [sample])
        results.append(metric.compute())
    best = {}
    for name in task.known_metrics():
        values = [float(found[name]) for found in results if name in found and not math.isnan(found[name])]
        if values:
            best[name] = max(values) if task.better_is_greater(name) else min(values)
    return best


def _image_size(sample: Sample) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return int(height), int(width)


def _sides(sample: Sample) -> Tensor:
    """Return width and height of an image (2,)."""
    height, width = _image_size(sample)
    return torch.tensor([width, height], dtype=torch.float32)


def _numbers(key: str, prediction: str) -> Callable[[Task, Sequence[Sample]], list[Constant]]:
    def constants(task: Task, learned: Sequence[Sample]) -> list[Constant]:
        mean = torch.stack([torch.as_tensor(sample[key]).double() for sample in learned]).nanmean(0)
        return [lambda sample: {prediction: mean}]

    return constants


def _maps(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    targets = [sample[task.kind].as_subclass(Tensor) for sample in learned]
    if task.kind == "depth":
        numbers = torch.cat([target[target.isfinite()] for target in targets])
        values = [numbers.median(), numbers.mean(), numbers.log().mean().exp()]
    elif task.kind == "normals":
        mean = torch.cat([target[:, target.isfinite().all(0)] for target in targets], dim=1).mean(1)
        values = [mean / mean.norm(), torch.tensor([0.0, 0.0, 1.0])]
    else:
        values = [torch.tensor(0.0), torch.tensor(1.0)]

    def everywhere(value: Tensor) -> Constant:
        def predict(sample: Sample) -> Prediction:
            filled = value.reshape(-1, 1, 1).expand(-1, *_image_size(sample))
            return {task.kind: filled if task.kind == "normals" else filled[0]}

        return predict

    return [everywhere(value) for value in values]


def _classes(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    label, _ = Counter(int(sample["label"]) for sample in learned).most_common(1)[0]
    scores = torch.nn.functional.one_hot(torch.tensor(label), len(task.classes)).float()
    return [lambda sample: {"label": label, "scores": scores}]


def _label_maps(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    K = len(task.classes)
    counts = sum(torch.bincount(s["mask"].as_subclass(Tensor).long().flatten(), minlength=256)[:K] for s in learned)
    label = int(torch.as_tensor(counts).argmax())
    return [lambda sample: {"mask": torch.full(_image_size(sample), label, dtype=torch.uint8)}]


def _one_box(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    labels = Counter(int(label) for sample in learned for label in sample["labels"])
    label, _ = labels.most_common(1)[0]
    relative = [sample["boxes"].as_subclass(Tensor) / _sides(sample).repeat(2) for sample in learned]
    mean = torch.cat(relative).mean(0)  # (4,), parts of the width and height

    def predict(sample: Sample) -> Prediction:
        box = mean * _sides(sample).repeat(2)
        return {"boxes": box[None], "scores": torch.ones(1), "labels": torch.tensor([label])}

    return [predict]


def _one_mask(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    def with_mask(of_box: Constant) -> Constant:
        def predict(sample: Sample) -> Prediction:
            found = of_box(sample)
            masks = torch.zeros(1, *_image_size(sample), dtype=torch.uint8)
            x1, y1, x2, y2 = found["boxes"][0].round().int().tolist()
            masks[0, y1:y2, x1:x2] = 1
            return {**found, "masks": masks}

        return predict

    return [with_mask(of_box) for of_box in _one_box(task, learned)]


def _mean_points(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    relative = torch.cat([sample["keypoints"].as_subclass(Tensor) / _sides(sample) for sample in learned])  # (n, P, 2)
    known = torch.cat([sample["visible"] > 0 for sample in learned])[..., None]  # (n, P, 1)
    points = (relative * known).sum(0) / known.sum(0).clamp(min=1)  # (P, 2)

    def with_points(of_box: Constant) -> Constant:
        def predict(sample: Sample) -> Prediction:
            return {**of_box(sample), "keypoints": points[None] * _sides(sample)}

        return predict

    return [with_points(of_box) for of_box in _one_box(task, learned)]


def _random(task: Task, learned: Sequence[Sample]) -> list[Constant]:
    generator = torch.Generator().manual_seed(0)
    return [lambda sample: {"embedding": torch.randn(task.options.width, generator=generator)}]


_CONSTANTS: dict[str, Callable[[Task, Sequence[Sample]], list[Constant]]] = {
    "detection": _one_box,
    "segmentation": _label_maps,
    "classification": _classes,
    "attributes": _numbers("attributes", "scores"),
    "regression": _numbers("value", "value"),
    "depth": _maps,
    "normals": _maps,
    "edges": _maps,
    "saliency": _maps,
    "keypoints": _mean_points,
    "instances": _one_mask,
    "retrieval": _random,
}
"""Kind of task -> its constant predictors."""
