"""CachedDataset reads every sample once, within its limit of memory."""

import torch

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.loading.cache import CachedDataset


class Counting(SampleDataset):
    """Five images of 3 x 16 x 16 bytes; counts the reads."""

    kind, classes, reads = "classification", ["a"], 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.reads += 1
        image = torch.full((3, 16, 16), index, dtype=torch.uint8)
        return {"image": image, "label": 0, "path": f"{index}.png", "index": index}


def test_every_sample_is_read_once():
    dataset = Counting()
    cached = CachedDataset(dataset)
    for _ in range(3):
        assert [cached[i]["index"] for i in range(5)] == list(range(5))
    assert dataset.reads == 5


def test_samples_beyond_the_limit_are_read_every_time():
    dataset = Counting()
    cached = CachedDataset(dataset, max_bytes=2 * 3 * 16 * 16)
    for _ in range(3):
        [cached[i] for i in range(5)]
    assert dataset.reads == 5 + 3 + 3  # two samples are kept, three are read every time
