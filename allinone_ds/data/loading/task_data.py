"""The data of one task or joint group: its samples, and how batches are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from allinone_ds.data.base import Sample, SampleDataset

Batch = dict[str, Any]
Collate = Callable[[list[Sample]], Batch]
Transform = Callable[[Sample], Sample]


@dataclass(frozen=True)
class Joint:
    """The tasks of a joint group, whose samples have `targets` for them.

    Example:
        >>> Joint(("seg", "depth"), at="features").tasks
        ('seg', 'depth')
    """

    tasks: tuple[str, ...]
    """Names of the tasks."""
    at: str = "backbone"
    """Where their gradients are balanced: "backbone" or "features", see `TaskBalancer.joint`."""
    test_time: Mapping[str, Any] = field(default_factory=dict)
    """Task -> views that an evaluation predicts, a `TestTime`."""


@dataclass
class TaskData:
    """The data of one task, or of the tasks of one joint group.

    Worker processes receive it pickled, so `collate` must be a function of a module or a staticmethod.

    Example:
        >>> import torch
        >>> from allinone_ds.data import SampleDataset, Schedule, eval_transform, stack_pixels, train_loader
        >>> from torchvision import tv_tensors
        >>> class Shades(SampleDataset):
        ...     kind, classes = "classification", ["dark", "bright"]
        ...     def __len__(self):
        ...         return 6
        ...     def __getitem__(self, index):
        ...         image = tv_tensors.Image(torch.full((3, 4, 4), 40 * index, dtype=torch.uint8))
        ...         return {"image": image, "label": index // 3, "path": str(index), "index": index}
        >>> def collate(samples):
        ...     return {"pixel_values": stack_pixels(samples), "labels": [sample["label"] for sample in samples]}
        >>> data = {"cls": TaskData(Shades(), eval_transform((8, 8)), collate, batch_size=2, micro_steps=3)}
        >>> schedule = Schedule(0, sizes={"cls": 6}, batch={"cls": (2, 3)}, world_size=1)
        >>> step = next(iter(train_loader(data, schedule, rank=0, start_step=0, max_steps=10)))
        >>> step.step, len(step.batches["cls"]), step.batches["cls"][0]["pixel_values"].shape
        (0, 3, torch.Size([2, 3, 8, 8]))
    """

    dataset: SampleDataset
    """The samples."""
    transform: Transform
    """Sample -> sample of the model's image size. A `SampleTransform` also receives further samples of the dataset."""
    collate: Collate
    """Samples -> {"pixel_values", "labels"}."""
    batch_size: int
    """Images per rank and micro-step."""
    micro_steps: int = 1
    """Micro-batches per optimizer step."""
    cache: bool = False
    """Keep decoded samples in memory (see `CachedDataset`)."""
    test_time: Any = None
    """Views that an evaluation predicts, a `TestTime`; None for the image alone."""
    joint: Joint | None = None
    """The tasks of a joint group; None: the data is that of one task."""
