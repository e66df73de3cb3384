"""Loaders: one item is one optimizer step for training, one micro-batch for evaluation."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from allinone_ds.data.augmentation.transforms import SampleTransform
from allinone_ds.data.base import Problem, Sample, SampleDataset
from allinone_ds.data.schedule import Draw, Schedule
from allinone_ds.errors import BrokenSample, DataError

Batch = dict[str, Any]
Collate = Callable[[list[Sample]], Batch]
Transform = Callable[[Sample], Sample]
Share = Mapping[str, Sequence[tuple[int, int]]]
"""{task: (micro-step, rank) of each of the schedule's micro-batches that one rank takes}."""


@dataclass
class TaskData:
    """What the train loader needs of one task.

    With worker processes all of it is pickled, so `collate` is a function of a module or a staticmethod.
    """

    dataset: SampleDataset
    transform: Transform
    """Sample -> sample of the network's size. A `SampleTransform` is also given further samples of the dataset."""
    collate: Collate
    """Samples -> {"pixel_values", "labels"}."""
    batch_size: int
    """Images per rank and micro-step."""
    micro_steps: int = 1
    """Micro-batches per optimizer step."""
    cache: bool = False
    """Keep decoded samples in memory (see `CachedDataset`)."""
    test_time: Any = None
    """Views that an evaluation predicts, a `TestTime`; None: the image alone."""


class StepBatch(NamedTuple):
    """All micro-batches of one optimizer step on one rank."""

    step: int
    """Optimizer step, from 0."""
    batches: dict[str, list[Batch]]
    """{task: its micro-batches}, in the order the tasks run; tasks of this rank only."""
    broken: list[str]
    """`path: reason` of each unreadable sample met; the next of the order took its place."""


@dataclass
class EvalBatch:
    """One micro-batch of an evaluation."""

    samples: list[Sample]
    """The samples that count, before the transform; sample i belongs to row i of `batch`."""
    batch: Batch
    """The collated batch. With `count` 0 it holds one sample that only keeps the rank in step."""
    count: int
    """How many samples count: the length of `samples`."""
    broken: list[str] = field(default_factory=list)
    """`path: reason` of each unreadable sample left out."""


class CachedDataset(SampleDataset):
    """Keeps decoded samples in memory, in each process its own; for small images, where decoding is most of
    the work.

    Samples are shared between calls, so transforms must not write into them (torchvision's do not).

    Args:
        dataset: the dataset behind.
        max_bytes: pixels, in bytes, from which on nothing more is kept.
    """

    def __init__(self, dataset: SampleDataset, max_bytes: int = 2**30):
        self.dataset = dataset
        self.kind, self.classes, self.name = dataset.kind, dataset.classes, dataset.name
        self.structural = getattr(dataset, "structural", [])
        self.max_bytes = max_bytes
        self._samples: dict[int, Sample] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        return self.dataset.path(index)

    def check(self, index: int) -> list[Problem]:
        return self.dataset.check(index)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples.get(index)
        if sample is None:
            sample = self.dataset[index]
            size = sum(v.nbytes for v in sample.values() if isinstance(v, torch.Tensor))
            if self._bytes + size <= self.max_bytes:
                self._samples[index] = sample
                self._bytes += size
        return dict(sample)


class FurtherSamples:
    """Gives further samples of a dataset to a transform that joins several; places are drawn with torch's generator.

    Args:
        dataset: of the sample that is being transformed.
        broken: gets `path: reason` of each unreadable sample met; another is drawn in its place.
        max_broken: unreadable samples in a row after which it gives up.
    """

    def __init__(self, dataset: SampleDataset, broken: list[str], max_broken: int):
        self.dataset = dataset
        self.broken = broken
        self.max_broken = max_broken

    def __call__(self) -> Sample:
        """One sample as the dataset gives it.

        Raises:
            DataError: more than `max_broken` draws in a row met an unreadable one.
        """
        tried: set[int] = set()
        while len(tried) <= min(self.max_broken, len(self.dataset) - 1):
            index = int(torch.randint(len(self.dataset), ()))
            if index in tried:
                continue
            try:
                return self.dataset[index]
            except BrokenSample as error:
                tried.add(index)
                self.broken.append(str(error))
        raise DataError(_gave_up(self.dataset.name, len(tried), self.broken))


def _gave_up(where: str, count: int, broken: list[str]) -> str:
    return (
        f"{where}: {count} samples in a row cannot be read (first: {broken[-count]}); "
        "repair the data (`allinone-ds check CONFIG` lists every fault) or raise max_broken_images"
    )


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
            for task in self.schedule.order(step):
                if task in self.share:
                    batches[task] = [self._micro_batch(task, step, k, rank, broken) for k, rank in self.share[task]]
        return StepBatch(step, batches, broken)

    def _micro_batch(self, task: str, step: int, micro_step: int, rank: int, broken: list[str]) -> Batch:
        draws = self.schedule.draw(task, step, micro_step, rank)
        return self.data[task].collate([self._sample(task, draw, broken) for draw in draws])

    def _sample(self, task: str, draw: Draw, broken: list[str]) -> Sample:
        """The transformed sample of a draw, or the next readable one of the order under the same seed."""
        data = self.data[task]
        tried: set[int] = set()
        position = draw.position
        while len(tried) <= min(self.max_broken, len(data.dataset) - 1):
            index = self.schedule.at(task, position).index
            position += 1
            if index in tried:  # an epoch's border can bring one index twice
                continue
            seed_all(draw.seed)
            try:
                sample = data.dataset[index]
            except BrokenSample as error:
                tried.add(index)
                broken.append(str(error))
                continue
            if isinstance(data.transform, SampleTransform):
                return data.transform(sample, FurtherSamples(data.dataset, broken, self.max_broken))
            return data.transform(sample)
        raise DataError(_gave_up(f"task '{task}'", len(tried), broken))


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
    """A loader whose items are the optimizer steps `start_step`..`max_steps`-1 of one rank.

    Augmentation is seeded per sample, so the batches do not depend on the number of workers, nor on where a
    run was resumed. The process's own random state is left as it was.

    Args:
        data: {task: TaskData}; batch sizes and micro-steps must be the schedule's.
        schedule: which samples a step takes.
        rank: of this process.
        start_step: first step, 0 or where a run is resumed.
        max_steps: step after the last.
        num_workers: processes that read ahead, each whole steps; 0 reads in this process.
        max_broken: unreadable samples in a row after which one micro-batch gives up. The whole run's count is
            the caller's: `StepBatch.broken` lists them.
        pin_memory: batches in page-locked memory.
        multiprocessing_context: "fork", "spawn" or "forkserver" for the workers; None is the platform's own.
        share: which of the schedule's micro-batches this rank takes; None: its own of every task.

    Raises:
        ValueError: data and schedule disagree.
        DataError: from the loader, when more than `max_broken` samples in a row cannot be read.
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
                f"{planned} in the schedule; make the schedule from the same numbers"
            )
    cached = {
        task: TaskData(
            CachedDataset(d.dataset) if d.cache else d.dataset,
            d.transform,
            d.collate,
            d.batch_size,
            d.micro_steps,
        )
        for task, d in data.items()
    }
    if share is None:
        share = {task: [(k, rank) for k in range(data[task].micro_steps)] for task in schedule.tasks}
    steps = _StepDataset(cached, schedule, start_step, max_steps, max_broken, share)
    return _loader(steps, num_workers, pin_memory, multiprocessing_context)


class _EvalDataset(Dataset[EvalBatch]):
    """Item j is batch j of this rank: rank r takes samples r, r + R, r + 2R, ..."""

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
        self.mine = range(rank, len(dataset), ranks)
        longest = -(-len(dataset) // ranks)
        self.batches = -(-longest // batch_size)
        self._filler: Sample | None = None

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, item: int) -> EvalBatch:
        if not 0 <= item < len(self):
            raise IndexError(item)
        samples: list[Sample] = []
        broken: list[str] = []
        for index in self.mine[item * self.batch_size : (item + 1) * self.batch_size]:
            try:
                samples.append(self.dataset[index])
            except BrokenSample as error:
                broken.append(str(error))
        inputs = samples or [self._fill()]
        with own_random_state():
            seed_all(item)
            batch = self.collate([self.transform(sample) for sample in inputs])
        return EvalBatch(samples, batch, len(samples), broken)

    def _fill(self) -> Sample:
        """A readable sample for a batch that has none of its own: every rank must run every forward."""
        if self._filler is None:
            for index in range(len(self.dataset)):
                try:
                    self._filler = self.dataset[index]
                    break
                except BrokenSample:
                    continue
            else:
                raise DataError(f"{self.dataset.name}: not one of {len(self.dataset)} samples can be read; repair them")
        return self._filler


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
    """A loader over a whole dataset, shared out over the ranks.

    Every rank yields the same number of batches; every readable sample counts on exactly one rank. The last
    batch of a rank may be short; a rank without samples left repeats one, with count 0.

    Args:
        dataset: the test set.
        transform: sample -> sample of the network's size.
        collate: samples -> {"pixel_values", "labels"}.
        batch_size: images per rank and batch.
        rank: of this process.
        world_size: number of ranks.
        num_workers: processes that read ahead; 0 reads in this process.
        multiprocessing_context: "fork", "spawn" or "forkserver" for the workers; None is the platform's own.

    Raises:
        DataError: from the loader, when a filler is needed and no sample at all can be read.
    """
    batches = _EvalDataset(dataset, transform, collate, batch_size, rank, world_size)
    return _loader(batches, num_workers, False, multiprocessing_context)


def _loader(dataset: Dataset[Any], num_workers: int, pin_memory: bool, context: str | None) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=context if num_workers > 0 else None,
        generator=torch.Generator(),  # so that making an iterator does not draw from the process's generator
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Launchers send SIGTERM to workers as well as to ranks, which still need them to end their step and save."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))  # seconds until it ends after all
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


def seed_all(seed: int) -> None:
    """Seeds torch's CPU generator, numpy and python: whatever a transform draws from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Puts the process's random state back afterwards."""
    before = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
