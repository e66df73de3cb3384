"""Loaders: an item is one optimizer step in training, and one micro-batch in evaluation."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from allinone_ds.data.augmentation.transforms import SampleTransform
from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.data.loading.cache import CachedDataset
from allinone_ds.data.loading.further_samples import FurtherSamples, too_many_broken
from allinone_ds.data.loading.random_state import own_random_state, seed_all
from allinone_ds.data.loading.schedule import Draw, Schedule
from allinone_ds.data.loading.task_data import Batch, Collate, TaskData, Transform
from allinone_ds.data.loading.workers.packing import pack, unpack
from allinone_ds.errors import AllInOneError, BrokenSample, DataError

Share = Mapping[str, Sequence[tuple[int, int]]]
"""{task: (micro-step, rank) of each micro-batch of the schedule that this rank trains on}."""

_TERMINATION_DELAY = 60  # seconds that a worker lives on after SIGTERM


class StepBatch(NamedTuple):
    """All micro-batches of one optimizer step on one rank, as `train_loader` yields it.

    Example:
        >>> step = StepBatch(step=0, batches={"det": [{"labels": [1, 2]}]}, broken=[])
        >>> list(step.batches)
        ['det']
    """

    step: int
    """Optimizer step, from 0."""
    batches: dict[str, list[Batch]]
    """{task: its micro-batches on this rank}, in the order in which the tasks run."""
    broken: list[str]
    """`path: reason` of each sample that could not be read and was replaced by the next one of the schedule."""


@dataclass
class EvalBatch:
    """One micro-batch of an evaluation, as `eval_loader` yields it.

    Example:
        >>> batch = EvalBatch(samples=[{"label": 3}], batch={"labels": [3]}, count=1)
        >>> batch.broken
        []
    """

    samples: list[Sample]
    """The samples to evaluate, before the transform; sample i belongs to row i of `batch`."""
    batch: Batch
    """The collated batch. If `count` is 0, it holds one sample, only so that this rank runs a forward pass."""
    count: int
    """Number of samples to evaluate, the length of `samples`."""
    broken: list[str] = field(default_factory=list)
    """`path: reason` of each sample that could not be read and was left out."""


class _StepDataset(Dataset[StepBatch]):
    """Item i is step `start_step + i` of this rank."""

    def __init__(
        self,
        data: dict[str, TaskData],
        schedule: Schedule,
        start_step: int,
        max_steps: int,
        max_broken: int,
        share: Share,
    ):
        self.data = data
        self.schedule = schedule
        self.share = share
        self.start_step = start_step
        self.max_steps = max_steps
        self.max_broken = max_broken

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step)

    def __getitem__(self, item: int) -> StepBatch:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step = self.start_step + item
        broken: list[str] = []
        batches: dict[str, list[Batch]] = {}
        with own_random_state():
            for task in self.schedule.tasks_of(step):
                if task in self.share:
                    batches[task] = [self._micro_batch(task, step, k, rank, broken) for k, rank in self.share[task]]
        return StepBatch(step, batches, broken)

    def _micro_batch(self, task: str, step: int, micro_step: int, rank: int, broken: list[str]) -> Batch:
        draws = self.schedule.draw(task, step, micro_step, rank)
        return self.data[task].collate([self._sample(task, draw, broken) for draw in draws])

    def _sample(self, task: str, draw: Draw, broken: list[str]) -> Sample:
        """Return the transformed sample of a draw, or the next readable sample of the schedule with the same seed."""
        data = self.data[task]
        tried: set[int] = set()
        position = draw.position
        while len(tried) <= min(self.max_broken, len(data.dataset) - 1):
            index = self.schedule.at(task, position).index
            position += 1
            if index in tried:  # an index can occur twice around the end of an epoch
                continue
            seed_all(draw.seed)
            try:
                sample = data.dataset[index]
                return _transformed(data.transform, sample, FurtherSamples(data.dataset, broken, self.max_broken))
            except BrokenSample as error:
                tried.add(index)
                broken.append(str(error))
        raise too_many_broken(f"task '{task}'", len(tried), broken)


def train_loader(
    data: Mapping[str, TaskData],
    schedule: Schedule,
    rank: int,
    start_step: int,
    max_steps: int,
    num_workers: int = 0,
    max_broken: int = 0,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
    share: Share | None = None,
) -> DataLoader[StepBatch]:
    """Return a loader whose items are the optimizer steps `start_step`..`max_steps`-1 of one rank.

    Augmentation is seeded per sample, so the batches depend neither on the number of workers nor on the step at which
    a run was resumed. The random state of the process does not change. `TaskData` has an example.

    Args:
        data: {task: TaskData}, with the batch sizes and micro-steps of the schedule.
        schedule: the samples of each step.
        rank: rank of this process.
        start_step: first step: 0, or the step at which a run is resumed.
        max_steps: step after the last.
        num_workers: processes that read ahead, each of them complete steps; 0 reads in this process.
        max_broken: number of samples in a row that may be unreadable while one sample is read. The caller counts those
            of the whole run, which `StepBatch.broken` lists.
        pin_memory: whether batches are copied into page-locked memory.
        multiprocessing_context: "fork", "spawn" or "forkserver" for the workers; None is the platform's default.
        share: the micro-batches of the schedule that this rank trains on; None is its own of every task.

    Raises:
        ValueError: data and schedule differ.
        DataError: raised by the loader if more than `max_broken` samples in a row cannot be read.
    """
    for task in schedule.tasks:
        if task not in data:
            raise ValueError(f"the schedule has task '{task}', data has {sorted(data)}; give both the same tasks")
        given = data[task]
        found = (len(given.dataset), given.batch_size, given.micro_steps)
        planned = (schedule.sizes[task], *schedule.batch[task])
        if found != planned:
            raise ValueError(
                f"task '{task}': (samples, batch_size, micro_steps) are {found} in data, "
                f"{planned} in the schedule; construct the schedule with the numbers of the data"
            )
        if given.dataset.draw_parts != schedule.parts[task]:
            raise ValueError(
                f"task '{task}': its dataset has sources with weights that the schedule does not have; construct the "
                "schedule with parts={task: dataset.draw_parts}"
            )
    cached = {task: replace(d, dataset=CachedDataset(d.dataset)) if d.cache else d for task, d in data.items()}
    if share is None:
        share = {task: [(k, rank) for k in range(data[task].micro_steps)] for task in schedule.tasks}
    for task in schedule.tasks:  # workers that are forked share the order of this epoch
        schedule.at(task, schedule.position(task, start_step))
    steps = _StepDataset(cached, schedule, start_step, max_steps, max_broken, share)
    return _loader(steps, num_workers, pin_memory, multiprocessing_context)


class _EvalDataset(Dataset[EvalBatch]):
    """Item j is batch j of this rank: rank r reads samples r, r + R, r + 2R, ..."""

    def __init__(
        self,
        dataset: SampleDataset,
        transform: Transform,
        collate: Collate,
        batch_size: int,
        rank: int,
        ranks: int,
    ):
        self.dataset = dataset
        self.transform = transform
        self.collate = collate
        self.batch_size = batch_size
        self.indices = range(rank, len(dataset), ranks)
        most_samples = -(-len(dataset) // ranks)
        self.batches = -(-most_samples // batch_size)
        self._placeholder: Sample | None = None

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, item: int) -> EvalBatch:
        if not 0 <= item < len(self):
            raise IndexError(item)
        samples: list[Sample] = []
        inputs: list[Sample] = []
        broken: list[str] = []
        with own_random_state():
            seed_all(item)
            for index in self.indices[item * self.batch_size : (item + 1) * self.batch_size]:
                try:
                    sample = self.dataset[index]
                    inputs.append(_transformed(self.transform, sample))
                except BrokenSample as error:
                    broken.append(str(error))
                else:
                    samples.append(sample)
            batch = self.collate(inputs or [self._readable_input()])
        return EvalBatch(samples, batch, len(samples), broken)

    def _readable_input(self) -> Sample:
        """Return any sample for a batch that has none, since every rank must run every forward pass."""
        if self._placeholder is None:
            for index in range(len(self.dataset)):
                try:
                    self._placeholder = _transformed(self.transform, self.dataset[index])
                    break
                except BrokenSample:
                    continue
            else:
                raise DataError(f"{self.dataset.name}: none of {len(self.dataset)} samples can be read; repair them")
        return self._placeholder


def _transformed(transform: Transform, sample: Sample, further: FurtherSamples | None = None) -> Sample:
    """Return a transformed sample.

    Raises:
        BrokenSample: the transform fails on this sample.
    """
    if isinstance(transform, SampleTransform):
        return transform(sample, further)
    try:
        return transform(sample)
    except AllInOneError:
        raise
    except Exception as error:  # of the user's own
        name, path = getattr(transform, "__name__", type(transform).__name__), str(sample.get("path", "sample"))
        raise BrokenSample(path, f"the transform {name} fails on it: {type(error).__name__}: {error}") from error


def eval_loader(
    dataset: SampleDataset,
    transform: Transform,
    collate: Collate,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    multiprocessing_context: str | None = None,
) -> DataLoader[EvalBatch]:
    """Return a loader over a whole dataset, distributed over the ranks.

    Every rank yields the same number of batches, and every readable sample is evaluated on exactly one rank. The last
    batch of a rank may be smaller; a rank without any sample left yields an arbitrary one with `count` 0.

    Args:
        dataset: the test set.
        transform: sample -> sample of the model's image size.
        collate: samples -> {"pixel_values", "labels"}.
        batch_size: images per rank and batch.
        rank: rank of this process.
        world_size: number of ranks.
        num_workers: processes that read ahead; 0 reads in this process.
        multiprocessing_context: "fork", "spawn" or "forkserver" for the workers; None is the platform's default.

    Raises:
        DataError: raised by the loader if a batch has no readable sample and neither has the dataset.

    Example:
        >>> from allinone_ds.data import SampleDataset, eval_transform, stack_pixels
        >>> from torchvision import tv_tensors
        >>> class Black(SampleDataset):
        ...     kind, classes = "classification", ["black"]
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, index):
        ...         return {"image": tv_tensors.Image(torch.zeros(3, 4, 4, dtype=torch.uint8)), "index": index}
        >>> def collate(samples):
        ...     return {"pixel_values": stack_pixels(samples)}
        >>> for rank in (0, 1):
        ...     loader = eval_loader(Black(), eval_transform((8, 8)), collate, batch_size=1, rank=rank, world_size=2)
        ...     print([item.count for item in loader])
        [1, 1]
        [1, 0]
    """
    batches = _EvalDataset(dataset, transform, collate, batch_size, rank, world_size)
    return _loader(batches, num_workers, False, multiprocessing_context)


class _InWorkers(Dataset[Any]):
    """Returns the errors of a dataset that are written for users; torch would raise tracebacks of workers instead."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> Any:
        try:
            return self.dataset[item]
        except AllInOneError as error:
            return error


class _Loader(DataLoader[Any]):
    """Unpacks what the workers packed, and raises the errors that they met."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        items = super().__iter__()
        return self._unpacked(items) if self.num_workers else items

    def _unpacked(self, items: Iterator[Any]) -> Iterator[Any]:
        # metrics keep boxes and labels of an evaluation until its end, training keeps nothing
        copy = isinstance(self.dataset, _InWorkers) and isinstance(self.dataset.dataset, _EvalDataset)
        for packed in items:
            if isinstance(item := unpack(packed, copy), AllInOneError):
                raise item
            yield item


def _loader(dataset: Dataset[Any], num_workers: int, pin_memory: bool, context: str | None) -> DataLoader[Any]:
    return _Loader(
        _InWorkers(dataset) if num_workers else dataset,
        batch_size=None,
        collate_fn=pack if num_workers else _identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=context if num_workers > 0 else None,
        generator=torch.Generator(),  # otherwise every iterator draws from the generator of the process
        worker_init_fn=_prepare_worker,
    )


def _prepare_worker(worker: int) -> None:
    """Keep a worker alive after SIGTERM: launchers also signal the ranks, which need it to finish their step.

    Its garbage collector leaves out what it was forked with, whose pages it would otherwise copy.
    """
    gc.freeze()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_TERMINATION_DELAY))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _identity(item: Any) -> Any:
    return item
