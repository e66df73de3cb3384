"""Two ranks with different numbers of images: metrics equal those of one process. Started by test_ranks.py."""

import sys

import torch
import torch.distributed as dist

from tests.launcher import run_checks
from tests.tasks.dense.tiny import KINDS, dense_samples
from tests.tasks.dense.tiny import build as build_dense
from tests.tiny import samples, tiny_model


def compare(name: str, part: slice) -> None:
    """Compare the metric of all ranks, of which each has `part` of seven images, with that of one process."""
    torch.manual_seed(3)
    task = tiny_model().tasks[name]
    images = samples(7)
    generator = torch.Generator().manual_seed(5)
    predictions = []
    for i, sample in enumerate(images):
        jitter = torch.randint(0, 5, (1, 4), generator=generator)
        predictions.append(
            {
                "boxes": sample["boxes"].as_subclass(torch.Tensor) + jitter,
                "labels": sample["labels"],
                "scores": torch.full((1,), 0.9 - 0.1 * i),
                "mask": torch.where(torch.rand(32, 32, generator=generator) < 0.3, 1, sample["mask"] % 3).byte(),
                "label": 1,
            }
        )
    metric = task.metric()
    metric.update(predictions[part], images[part])
    distributed = metric.compute()
    details = task.details(metric)
    single = task.metric()
    if name == "det":
        single.images, is_initialized = [], dist.is_initialized
        single.update(predictions, images)
        dist.is_initialized = lambda: False
        try:
            expected = single.compute()
        finally:
            dist.is_initialized = is_initialized
    else:
        single.sync_on_compute = False
        single._to_sync = False
        single.update(predictions, images)
        expected = single.compute()
    assert details == task.details(single) and details["per_class"]  # counts, confusions and values of every class
    assert set(distributed) == set(expected)
    for key, value in expected.items():
        assert abs(distributed[key] - value) < 1e-6, (name, key, distributed[key], value)
    assert 0 < distributed[task.main_metric] <= 1


def check_dense_kinds() -> None:
    """The metrics of maps on two ranks, of which one may have no image, equal those of one process exactly."""
    generator = torch.Generator().manual_seed(5)
    made = dense_samples(7)
    found = [
        {
            "depth": 1 + 4 * torch.rand(32, 32, generator=generator),
            "normals": torch.randn(3, 32, 32, generator=generator),
            "edges": torch.rand(32, 32, generator=generator),
            "saliency": torch.rand(32, 32, generator=generator),
        }
        for _ in made
    ]
    for first in (5, 7):
        part = slice(0, first) if dist.get_rank() == 0 else slice(first, 7)
        for kind in KINDS:
            _, task = build_dense(kind)
            metric, single = task.metric(), task.metric()
            metric.update(found[part], made[part])
            single.sync_on_compute = False
            single._to_sync = False
            single.update(found, made)
            distributed, expected = metric.compute(), single.compute()
            assert set(distributed) == set(expected) and 0 < expected[task.main_metric] <= 1
            for key, value in expected.items():
                assert abs(distributed[key] - value) < 1e-12, (kind, key, distributed[key], value)
            assert task.details(metric) == task.details(single)


def check_unequal() -> None:
    part = slice(0, 5) if dist.get_rank() == 0 else slice(5, 7)
    for name in ("det", "seg", "cls"):
        compare(name, part)


def check_a_rank_without_images() -> None:
    part = slice(0, 7) if dist.get_rank() == 0 else slice(7, 7)
    for name in ("det", "seg", "cls"):
        compare(name, part)


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
