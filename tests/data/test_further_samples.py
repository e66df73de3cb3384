"""Transforms that combine several samples in the loader: which ones they get, and how unreadable ones are replaced."""

import pytest
import torch
from torchvision import tv_tensors

from allinone_ds.data.augmentation.transforms import stack_images, train_transform
from allinone_ds.data.base import SampleDataset
from allinone_ds.data.loading.loader import TaskData, train_loader
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.errors import BrokenSample, DataError

SIZE = (24, 32)


class Shades(SampleDataset):
    """Sample i is an image of grey level 10 i + 5 with one box of label i; those in `broken` cannot be read."""

    kind = "detection"
    name = "shades"

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken
        self.classes = [str(i) for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSample(f"{index}.png", "is truncated")
        return {
            "image": tv_tensors.Image(torch.full((3, 20, 30), 10 * index + 5, dtype=torch.uint8)),
            "boxes": tv_tensors.BoundingBoxes([[0.0, 0.0, 30.0, 20.0]], format="XYXY", canvas_size=(20, 30)),
            "labels": torch.tensor([index]),
            "iscrowd": torch.tensor([False]),
            "path": f"{index}.png",
            "index": index,
        }


AUGMENT = {
    "branches": {
        "hard": {"probability": 0.6, "transforms": ["Mosaic", "MixUp", "RandomHorizontalFlip"]},
        "easy": {"probability": 0.4, "transforms": ["LargeScaleJitter"]},
    }
}


def collate(samples):
    return {
        "pixel_values": stack_images(samples),
        "labels": [sample["labels"].tolist() for sample in samples],
        "boxes": [sample["boxes"].tolist() for sample in samples],
    }


def loader(dataset, start=0, stop=6, workers=0, max_broken=5, batch_size=3, ranks=1, rank=0):
    data = {"det": TaskData(dataset, train_transform(AUGMENT, SIZE, "detection"), collate, batch_size, 2)}
    schedule = Schedule(4, {"det": len(dataset)}, {"det": (batch_size, 2)}, ranks)
    return train_loader(data, schedule, rank, start, stop, workers, max_broken)


def same(left, right) -> bool:
    assert len(left) == len(right) > 0
    for one, two in zip(left, right, strict=True):
        assert one.broken == two.broken
        for a, b in zip(one.batches["det"], two.batches["det"], strict=True):
            if not torch.equal(a["pixel_values"], b["pixel_values"]) or a["labels"] != b["labels"]:
                return False
            assert a["boxes"] == b["boxes"]
    return True


def test_further_samples_depend_neither_on_workers_nor_on_the_step_of_a_resume():
    dataset = Shades(12, broken=(3,))
    whole = list(loader(dataset))
    assert any(len(labels) > 1 for step in whole for batch in step.batches["det"] for labels in batch["labels"])
    torch.manual_seed(77)
    assert same(list(loader(dataset, start=4)), whole[4:])
    assert same(list(loader(dataset, workers=2)), whole)


def test_a_sample_does_not_depend_on_the_others_in_its_batch():
    dataset = Shades(12)
    pairs = [b for s in loader(dataset, stop=2, batch_size=6) for b in s.batches["det"]]
    halves = [[b for s in loader(dataset, stop=2, ranks=2, rank=r) for b in s.batches["det"]] for r in range(2)]
    for pair, first, second in zip(pairs, *halves, strict=True):
        assert torch.equal(pair["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
        assert pair["labels"] == first["labels"] + second["labels"]


def test_unreadable_further_samples_are_counted_and_replaced():
    plain, damaged = list(loader(Shades(12))), list(loader(Shades(12, broken=(1, 2, 8)), max_broken=9))
    reported = [line for step in damaged for line in step.broken]
    drawn = sum(len(step.batches["det"]) * 3 for step in damaged)
    assert set(reported) == {"1.png: is truncated", "2.png: is truncated", "8.png: is truncated"}
    assert len(reported) > drawn * 3 / 12 * 1.5  # further samples are counted in addition to the samples themselves
    labels = {k for step in damaged for batch in step.batches["det"] for boxes in batch["labels"] for k in boxes}
    assert labels == set(range(12)) - {1, 2, 8}
    assert all(step.broken == [] for step in plain)


class ReadableOnce(Shades):
    """Only the first read succeeds, so that no further sample can be read."""

    def __init__(self):
        super().__init__(6)
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 1:
            raise BrokenSample(f"{index}.png", "is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_further_samples_end_the_run_with_a_reason(workers):
    with pytest.raises(DataError, match=r"shades: 3 samples in a row cannot be read .*is truncated.*max_broken_images"):
        list(loader(ReadableOnce(), workers=workers, max_broken=2))


def test_a_transform_that_combines_samples_needs_further_ones():
    with pytest.raises(ValueError, match="Mosaic combines several samples; call the transform with `further`"):
        train_transform(["Mosaic"], SIZE)(Shades(2)[0])
    with pytest.raises(BrokenSample, match="Mosaic combines boxes or masks"):
        train_transform(["Mosaic"], SIZE)({"image": Shades(2)[0]["image"], "label": 1}, lambda: Shades(2)[1])
