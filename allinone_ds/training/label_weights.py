"""How much the loss of each micro-batch counts, so that a task's gradient is a mean over the labels of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from allinone_ds.distributed import cpu_group, world_size
from allinone_ds.tasks import Task


class LabelWeights:
    """Weights of the losses of a step.

    Rank r's loss of micro-step k is S_kr / d_kr: a sum over the micro-batch, divided by its labels or by 1 if it has
    none. The mean over all M micro-batches of the step of M d_kr / D times the loss is the sum of all S_kr divided by
    D, the labels of the whole step. The labels are counted on the CPU, and the ranks exchange the numbers of all tasks
    in one message per step, so that nothing waits for the device.

    Args:
        tasks: tasks by name, the same on every rank.
        micro_batches: task -> M, over all ranks.

    Example:
        >>> from allinone_ds.tasks.segmentation import SegmentationTask
        >>> task = SegmentationTask("seg", ["road", "sky"], channels=8, stride=4, num_levels=1, image_size=(8, 8))
        >>> weights = LabelWeights({"seg": task}, {"seg": 2})
        >>> whole, half = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> half[:, :4] = 255                           # no class
        >>> [round(weight, 3) for weight in weights.of_step({"seg": [whole, half]})["seg"]]
        [1.333, 0.667]
    """

    def __init__(self, tasks: Mapping[str, Task], micro_batches: Mapping[str, int]) -> None:
        self.tasks = {name: task for name, task in tasks.items() if type(task).count_labels is not Task.count_labels}
        self.micro_batches = dict(micro_batches)

    def of_step(self, labels: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
        """Return for each task the weight of each of its micro-batches on this rank. Collective.

        Args:
            labels: task -> the labels of its micro-batches on this rank, on the CPU.
        """
        counts = {name: [self._count(name, part) for part in labels[name]] for name in self.tasks if name in labels}
        totals = torch.tensor([sum(counts.get(name, ())) for name in self.tasks], dtype=torch.long)
        if world_size() > 1 and self.tasks:
            dist.all_reduce(totals, group=cpu_group())
        whole = dict(zip(self.tasks, totals.tolist(), strict=True))
        weights = {name: [1.0] * len(of_task) for name, of_task in labels.items()}
        for name, of_task in counts.items():
            weights[name] = [self.micro_batches[name] * max(n, 1) / max(whole[name], 1) for n in of_task]
        return weights

    def _count(self, name: str, labels: Any) -> int:
        count = self.tasks[name].count_labels(labels)
        return 1 if count is None else int(count)  # images: as many in every micro-batch
