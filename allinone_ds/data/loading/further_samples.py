"""Further samples of a dataset, for transforms that combine several."""

from __future__ import annotations

from allinone_ds.data.base import Sample, SampleDataset
from allinone_ds.errors import BrokenSample, DataError


class FurtherSamples:
    """Draws samples of a dataset with torch's generator, for a transform that combines several samples.

    Args:
        dataset: the dataset of the sample that is being transformed.
        broken: receives `path: reason` for each sample that cannot be read. Another one is drawn in its place.
        max_broken: number of samples that may be unreadable in a row.

    Example:
        >>> from allinone_ds.data.formats.common.classified_files import ClassifiedDataset
        >>> broken = []
        >>> draw = FurtherSamples(ClassifiedDataset("cats", "/data", ["1.png"], [0], ["cat"]), broken, max_broken=0)
        >>> draw()
        Traceback (most recent call last):
        allinone_ds.errors.DataError: cats: 1 samples in a row cannot be read (first: /data/1.png: file is missing...
        >>> broken
        ['/data/1.png: file is missing; restore it or remove the entry']
    """

    def __init__(self, dataset: SampleDataset, broken: list[str], max_broken: int):
        self.dataset = dataset
        self.broken = broken
        self.max_broken = max_broken

    def __call__(self) -> Sample:
        """Return a sample as the dataset gives it.

        Raises:
            DataError: more than `max_broken` samples in a row cannot be read.
        """
        tried: set[int] = set()
        while len(tried) <= min(self.max_broken, len(self.dataset) - 1):
            index = self.dataset.random_index()
            if index in tried:
                continue
            try:
                return self.dataset[index]
            except BrokenSample as error:
                tried.add(index)
                self.broken.append(str(error))
        raise too_many_broken(self.dataset.name, len(tried), self.broken)


def too_many_broken(where: str, count: int, broken: list[str]) -> DataError:
    """Return the error that ends a run whose last `count` samples, the end of the list `broken`, cannot be read."""
    return DataError(
        f"{where}: {count} samples in a row cannot be read (first: {broken[-count]}); "
        "repair the data (`allinone-ds check CONFIG` lists every fault) or raise max_broken_images"
    )
