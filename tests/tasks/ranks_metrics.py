"""Two ranks with unequal numbers of images: metrics must equal those of one process. Started by test_ranks.py."""

import sys

import torch
import torch.distributed as dist

from tests.launcher import run_checks
from tests.tiny import samples, tiny_model


def compare(name: str, share: slice) -> None:
    """Metric of all ranks, each holding `share` of seven images, against the metric of one process."""
    torch.manual_seed(3)
    task = tiny_model().tasks[name]
    made = samples(7)
    generator = torch.Generator().manual_seed(5)
    predictions = []
    for i, sample in enumerate(made):
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
    together = task.metric()
    together.update(predictions[share], made[share])
    found = together.compute()
    alone = task.metric()
    if name == "det":
        alone.images, ours = [], dist.is_initialized
        alone.update(predictions, made)
        dist.is_initialized = lambda: False
        try:
            expected = alone.compute()
        finally:
            dist.is_initialized = ours
    else:
        alone.sync_on_compute = False
        alone._to_sync = False
        alone.update(predictions, made)
        expected = alone.compute()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert abs(found[key] - value) < 1e-6, (name, key, found[key], value)
    assert 0 < found[task.main_metric] <= 1


def check_unequal() -> None:
    share = slice(0, 5) if dist.get_rank() == 0 else slice(5, 7)
    for name in ("det", "seg", "cls"):
        compare(name, share)


def check_a_rank_without_images() -> None:
    share = slice(0, 7) if dist.get_rank() == 0 else slice(7, 7)
    for name in ("det", "seg", "cls"):
        compare(name, share)


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
