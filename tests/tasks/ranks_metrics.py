"""Two ranks with different numbers of images: metrics equal those of one process. Started by test_ranks.py."""

import sys

import torch
import torch.distributed as dist

from tests.launcher import run_checks
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
