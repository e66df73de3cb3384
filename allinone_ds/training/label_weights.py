"""How much the loss of each micro-batch counts, so that a task's gradient is a mean over the labels of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from allinone_ds.balance.balancer import TaskBalancer
from allinone_ds.data.loading.task_data import Joint
from allinone_ds.distributed import cpu_group, world_size
from allinone_ds.tasks import Task


class StepWeights(Mapping[str, "Sequence[float] | None"]):
    """Weights of the micro-batches of one step on this rank, by task; the first look waits for the other ranks' labels.

    None stands for the weights of a task of a joint group that has no label in the step, on any rank.

    Args:
        received: waits for them.
    """

    def __init__(self, received: Callable[[], dict[str, list[float] | None]]) -> None:
        self._received = received

    @cached_property
    def _weights(self) -> dict[str, list[float] | None]:
        return self._received()

    def __getitem__(self, task: str) -> Sequence[float] | None:
        return self._weights[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class LabelWeights:
    """Weights of the losses of a step.

    Rank r's loss of micro-step k is S_kr / d_kr: a sum over the micro-batch, divided by its labels or by 1 if it has
    none. The mean over all M micro-batches of the step of M d_kr / D times the loss is the sum of all S_kr divided by
    D, the labels of the whole step. The labels are counted on the CPU, and the ranks exchange the numbers of all tasks
    in one message per step, which travels during the first forward, so that nothing waits for the device.

    Args:
        tasks: tasks by name, the same on every rank.
        micro_batches: task -> M, over all ranks.
        groups: joint group -> its tasks; its micro-batches may hold images without labels of some of them.

    Example:
        >>> from allinone_ds.tasks.segmentation import SegmentationTask
        >>> task = SegmentationTask("seg", ["road", "sky"], channels=8, stride=4, num_levels=1, image_size=(8, 8))
        >>> weights = LabelWeights({"seg": task}, {"seg": 2})
        >>> whole, half = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> half[:, :4] = 255                           # no class
        >>> step = {"seg": [{"labels": whole}, {"labels": half}]}
        >>> [round(weight, 3) for weight in weights.of_step(step)["seg"]]
        [1.333, 0.667]
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        micro_batches: Mapping[str, int],
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.groups = dict(groups or {})
        joint = {task for names in self.groups.values() for task in names}
        self.tasks = {
            name: task
            for name, task in tasks.items()
            if name in joint or type(task).count_labels is not Task.count_labels
        }
        self.micro_batches = dict(micro_batches)

    def of_step(self, batches: Mapping[str, Sequence[Mapping[str, Any]]]) -> StepWeights:
        """Return for each task the weight of each of its micro-batches on this rank. Collective.

        Args:
            batches: task or joint group -> its micro-batches on this rank, on the CPU.
        """
        weights: dict[str, list[float] | None] = {}
        parts: dict[str, list[tuple[int, int]]] = {}
        for name, of_step in batches.items():
            for task in self.groups.get(name, (name,)):
                weights[task] = [1.0] * len(of_step)
                if task in self.tasks:
                    parts[task] = [self._labels(task, batch, name in self.groups) for batch in of_step]
        sums = [[sum(column) for column in zip(*parts.get(name, [(0, 0)]), strict=True)] for name in self.tasks]
        totals = torch.tensor(sums, dtype=torch.long, device="cpu").reshape(-1, 2)
        sent = None
        if world_size() > 1 and self.tasks:
            sent = dist.all_reduce(totals, group=cpu_group(), async_op=True)

        def received() -> dict[str, list[float] | None]:
            if sent is not None:
                sent.wait()
            for name, (labels, images) in zip(self.tasks, totals.tolist(), strict=True):
                if name in parts:
                    M = self.micro_batches[name]
                    own = [M * (max(n, 1) if used else 0) / max(labels, 1) for n, used in parts[name]]
                    weights[name] = own if images else None
            return weights

        return StepWeights(received)

    def _labels(self, task: str, batch: Mapping[str, Any], joint: bool) -> tuple[int, int]:
        """Return the number of labels of a micro-batch, and of images that have some."""
        labels = batch["labels"][task] if joint else batch["labels"]
        images = batch["labelled"][task] if joint else 1  # without a group, as many in every micro-batch
        count = self.tasks[task].count_labels(labels) if images else 0
        return images if count is None else int(count), images


def block(balancer: TaskBalancer, name: str, joint: Joint | None, micro_steps: int) -> AbstractContextManager[None]:
    """Return the balancer's block of a task or joint group.

    Args:
        balancer: of the run.
        name: of the task or group.
        joint: settings of the group; None: it is a task.
        micro_steps: number of micro-batches.
    """
    if joint is None:
        return balancer.task(name, micro_steps=micro_steps)
    return balancer.joint(joint.tasks, micro_steps=micro_steps, at=joint.at)


def losses_of(
    model: nn.Module,
    name: str,
    joint: Joint | None,
    batch: Mapping[str, Any],
    weights: StepWeights,
    number: int,
) -> Any:
    """Return the weighted loss of a micro-batch, of a joint group task -> loss, None for a task without labels.

    Args:
        model: the DeepSpeed engine.
        name: of the task or group.
        joint: settings of the group; None: it is a task.
        batch: the micro-batch on the model's device.
        weights: what `LabelWeights.of_step` returned.
        number: of the micro-batch, from 0.
    """
    if joint is None:
        return model(task=name, **batch).loss * (weights[name] or ())[number]
    losses = {}
    for task, outputs in model(task=joint.tasks, **batch).items():
        own = weights[task]
        losses[task] = None if own is None else outputs.loss * own[number]
    return losses
