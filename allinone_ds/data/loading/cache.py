"""A cache of decoded samples."""

from __future__ import annotations

import torch

from allinone_ds.data.base import Part, Problem, Sample, SampleDataset


class CachedDataset(SampleDataset):
    """Keeps decoded samples in memory, separately in each process; useful for small images, which mostly cost decoding.

    Calls share the samples, so transforms must not modify them in place (torchvision's do not).

    Args:
        dataset: the dataset to read from.
        max_bytes: memory for tensors, in bytes. Samples beyond it are read every time.

    Example:
        >>> class Counting(SampleDataset):
        ...     kind, classes, reads = "classification", ["a"], 0
        ...     def __len__(self):
        ...         return 1
        ...     def __getitem__(self, index):
        ...         self.reads += 1
        ...         return {"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "label": 0}
        >>> dataset = Counting()
        >>> cached = CachedDataset(dataset)
        >>> _ = cached[0], cached[0]
        >>> dataset.reads
        1
    """

    def __init__(self, dataset: SampleDataset, max_bytes: int = 2**30):
        self.dataset = dataset
        self.kind, self.classes, self.name = dataset.kind, dataset.classes, dataset.name
        self.structural, self.in_memory, self.labels = dataset.structural, dataset.in_memory, dataset.labels
        self.max_bytes = max_bytes
        self._samples: dict[int, Sample] = {}
        self._bytes = 0

    @property
    def draw_parts(self) -> tuple[Part, ...]:
        return self.dataset.draw_parts

    def random_index(self) -> int:
        return self.dataset.random_index()

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        return self.dataset.path(index)

    def encoded(self, index: int) -> bytes | None:
        return self.dataset.encoded(index)

    def annotation(self, index: int) -> Sample:
        return self.dataset.annotation(index)

    def check(self, index: int) -> list[Problem]:
        return self.dataset.check(index)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples.get(index)
        if sample is None:
            sample = self.dataset[index]
            parts = [sample, *sample.get("targets", {}).values()]
            size = sum(v.nbytes for part in parts for v in part.values() if isinstance(v, torch.Tensor))
            if self._bytes + size <= self.max_bytes:
                self._samples[index] = sample
                self._bytes += size
        return dict(sample)
