"""Batches of joint groups, and the data of a joint group as one task sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from allinone_ds.data.augmentation.transforms import stack_pixels, stacked_once
from allinone_ds.data.base import Sample
from allinone_ds.data.joint.dataset import JointDataset, TaskView, view_of
from allinone_ds.data.loading.task_data import Batch, Collate, TaskData


@dataclass(frozen=True)
class JointCollate:
    """Makes a batch of a joint group: the images once, and for each task the labels of the images that have some.

    The `collate` of a task stacks pixels too. Those of all tasks that have labels of the same images are one tensor, so
    a batch is stacked once, whatever the number of tasks.

    Args:
        collates: task -> `collate` of its class.
        unlabelled: task -> `unlabelled` of its class, for batches without any label of the task.
    """

    collates: Mapping[str, Collate]
    unlabelled: Mapping[str, Callable[[Sample], Sample]]

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch of transformed samples of equal size.

        Returns:
            "pixel_values" (B, 3, H, W) uint8; "labels", task -> what its `collate` returned; "rows", task -> positions
            (n,) of the images that these labels belong to, None for all; "labelled", task -> number of images with a
            label, 0 if the labels are those of an unlabelled image.
        """
        with stacked_once():
            return self._batch(samples)

    def _batch(self, samples: list[Sample]) -> Batch:
        batch: Batch = {"pixel_values": stack_pixels(samples), "labels": {}, "rows": {}, "labelled": {}}
        for task, collate in self.collates.items():
            rows = [row for row, sample in enumerate(samples) if task in sample["targets"]]
            views = [view_of(samples[row], task) for row in rows]
            if not views:
                views = [self.unlabelled[task](view_of(samples[0], task))]
            batch["labels"][task] = collate(views)["labels"]
            batch["rows"][task] = None if len(rows) == len(samples) else torch.tensor(rows or [0])
            batch["labelled"][task] = len(rows)
        return batch


def by_task(data: Mapping[str, TaskData]) -> dict[str, TaskData]:
    """Return {task: its data}, each joint group replaced by what each of its tasks sees of it."""
    separate: dict[str, TaskData] = {}
    for name, part in data.items():
        if part.joint is None:
            separate[name] = part
            continue
        collate, dataset = part.collate, part.dataset
        assert isinstance(collate, JointCollate) and isinstance(dataset, JointDataset)
        for task in part.joint.tasks:
            separate[task] = replace(
                part,
                dataset=TaskView(dataset, task),
                collate=collate.collates[task],
                test_time=part.joint.test_time.get(task),
                joint=None,
            )
    return separate


def task_names(data: Mapping[str, TaskData]) -> list[str]:
    """Return the names of the tasks of ordinary data and of joint groups, in their order."""
    return [task for name, part in data.items() for task in ([name] if part.joint is None else part.joint.tasks)]


def views_of(samples: Sequence[Sample], task: str) -> tuple[list[int], list[Sample]]:
    """Return the positions of the samples that have a label of a task, and what the task sees of them."""
    rows = [row for row, sample in enumerate(samples) if task in sample["targets"]]
    return rows, [view_of(samples[row], task) for row in rows]
