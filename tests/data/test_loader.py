"""Loaders: batches depend only on the schedule, broken samples are replaced and reported, ranks stay in step."""

import gc
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from allinone_ds.data.augmentation.geometry import MultiSampleTransform
from allinone_ds.data.augmentation.transforms import SampleTransform, eval_transform, stack_images, train_transform
from allinone_ds.data.base import SampleDataset
from allinone_ds.data.formats.image_list import ImageListSource
from allinone_ds.data.loading.loader import TaskData, eval_loader, train_loader
from allinone_ds.data.loading.schedule import Schedule
from allinone_ds.data.sources import open_source
from allinone_ds.errors import BrokenSample, DataError
from allinone_ds.tasks.detection import DetectionTask
from tests.data.tiny_sets import write_images

SIZE = (16, 16)
AUGMENT = [
    "RandomHorizontalFlip",
    {"RandomResizedCrop": {"scale": [0.5, 1.0]}},
    {"ColorJitter": {"brightness": 0.4}},
]


def collate(samples):
    return {
        "pixel_values": stack_images(samples),
        "labels": torch.tensor([s["label"] for s in samples]),
        "index": torch.tensor([s["index"] for s in samples]),
    }


def noisy(sample):
    """A transform that draws from all three generators."""
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    out = eval_transform(SIZE)(sample)
    return {**out, "image": (out["image"] * sum(draws) / 3).to(torch.uint8)}


class Numbers(SampleDataset):
    """Sample i is an image of value i; those in `broken` cannot be read."""

    kind = "classification"
    classes = ["a"]

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSample(f"{index}.png", "is truncated")
        image = torch.full((3, 16, 16), index, dtype=torch.uint8)
        return {"image": image, "label": 0, "path": f"{index}.png", "index": index}


def setup(root: Path, world_size: int = 1, transform=None, **options):
    """Two tasks with different numbers of samples, batch sizes and micro-steps, on real files."""
    data = {}
    for task, count, batch, micro in (("a", 7, 2, 2), ("b", 5, 3, 1)):
        folder = root / task
        if not folder.exists():
            names = write_images(folder, count, ".jpg")
            (root / f"{task}.txt").write_text("".join(f"{n} 0\n" for n in names))
        source = ImageListSource(format="image_list", images=task, list=f"{task}.txt")
        chosen = transform or train_transform(AUGMENT, SIZE)
        data[task] = TaskData(open_source(source, root), chosen, collate, batch, micro, **options)
    sizes = {task: len(d.dataset) for task, d in data.items()}
    schedule = Schedule(3, sizes, {t: (d.batch_size, d.micro_steps) for t, d in data.items()}, world_size)
    return data, schedule


def same(left, right) -> bool:
    """Return whether two lists of StepBatch are exactly equal."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.step, list(a.batches), a.broken) == (b.step, list(b.batches), b.broken)
        for task in a.batches:
            for x, y in zip(a.batches[task], b.batches[task], strict=True):
                if not all(torch.equal(x[key], y[key]) for key in x):
                    return False
    return True


def test_one_item_is_one_optimizer_step(tmp_path):
    data, schedule = setup(tmp_path)
    steps = list(train_loader(data, schedule, rank=0, start_step=0, max_steps=4))
    assert [s.step for s in steps] == [0, 1, 2, 3]
    for s in steps:
        assert list(s.batches) == ["a", "b"] and s.broken == []
        assert [b["pixel_values"].shape for b in s.batches["a"]] == [(2, 3, *SIZE)] * 2
        assert [b["pixel_values"].shape for b in s.batches["b"]] == [(3, 3, *SIZE)]
        for task, batches in s.batches.items():
            for k, batch in enumerate(batches):
                drawn = [d.index for d in schedule.draw(task, s.step, k, 0)]
                assert batch["index"].tolist() == drawn


def test_workers_share_what_they_were_forked_with(tmp_path):
    data, schedule = setup(tmp_path)
    for part in data.values():
        part.collate = lambda samples: {"frozen": gc.get_freeze_count()}
    before = gc.get_freeze_count()
    loader = train_loader(data, schedule, 0, start_step=2, max_steps=3, num_workers=1, multiprocessing_context="fork")
    drawn = {(task, schedule.position(task, 2) // schedule.epoch_size(task)) for task in data}
    assert set(schedule._permutations) == drawn, "the order of the epoch is drawn before the workers are started"
    [step] = loader
    kept = len(gc.get_objects()) / 2
    assert all(batch["frozen"] > before + kept for batches in step.batches.values() for batch in batches)
    assert gc.get_freeze_count() == before, "the collector of this process does not change"


def test_a_rank_reads_only_its_share(tmp_path):
    data, schedule = setup(tmp_path, world_size=2)
    usual = [next(iter(train_loader(data, schedule, rank, 0, 1))).batches for rank in (0, 1)]
    share = {"a": [(0, 0), (0, 1), (1, 0), (1, 1)]}
    step = next(iter(train_loader(data, schedule, 1, 0, 1, share=share)))
    assert list(step.batches) == ["a"]
    for batch, (k, rank) in zip(step.batches["a"], share["a"], strict=True):
        assert batch["index"].tolist() == [draw.index for draw in schedule.draw("a", 0, k, rank)]
        assert all(torch.equal(batch[key], usual[rank]["a"][k][key]) for key in batch)  # with the same augmentation


@pytest.mark.parametrize(
    ("workers", "context", "transform"),
    [(1, "fork", None), (2, "fork", None), (2, "fork", "noisy"), (1, "spawn", "noisy")],
)
def test_batches_do_not_depend_on_the_workers(tmp_path, workers, context, transform):
    data, schedule = setup(tmp_path, transform=noisy if transform else None)
    alone = list(train_loader(data, schedule, 0, 0, 3))
    assert same(list(train_loader(data, schedule, 0, 0, 3, workers, multiprocessing_context=context)), alone)


def test_a_resumed_run_gets_the_batches_of_the_uninterrupted_one(tmp_path):
    data, schedule = setup(tmp_path)
    whole = list(train_loader(data, schedule, 0, 0, 6))
    torch.manual_seed(99)
    assert same(list(train_loader(*setup(tmp_path), 0, 4, 6)), whole[4:])
    assert list(train_loader(data, schedule, 0, 6, 6)) == [] == list(train_loader(data, schedule, 0, 9, 6))


def test_augmentation_differs_between_epochs_and_between_samples(tmp_path):
    data, schedule = setup(tmp_path, transform=train_transform(AUGMENT, SIZE))
    views: dict[int, list] = {}
    for step in train_loader(data, schedule, 0, 0, 10):
        for batch in step.batches["a"]:
            for index, image in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
                views.setdefault(index, []).append(image)
    assert all(len({tuple(v.flatten()[:50].tolist()) for v in seen}) == len(seen) > 3 for seen in views.values())


def test_the_random_state_of_the_process_does_not_change(tmp_path):
    data, schedule = setup(tmp_path, transform=noisy)

    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    expected = draws()
    for workers in (0, 1):
        seeded()
        list(train_loader(data, schedule, 0, 0, 2, workers))
        list(eval_loader(data["a"].dataset, noisy, collate, 2, num_workers=workers))
        assert draws() == expected


def test_a_cache_changes_no_batch(tmp_path):
    data, schedule = setup(tmp_path)
    plain = list(train_loader(data, schedule, 0, 0, 8))
    assert same(list(train_loader(*setup(tmp_path, cache=True), 0, 0, 8)), plain)


def one_task(dataset: SampleDataset, batch_size: int, world_size: int = 1, micro_steps: int = 1):
    data = {"n": TaskData(dataset, eval_transform(SIZE), collate, batch_size, micro_steps)}
    return data, Schedule(0, {"n": len(dataset)}, {"n": (batch_size, micro_steps)}, world_size)


def test_a_broken_sample_is_replaced_by_the_next_of_the_schedule():
    data, schedule = one_task(Numbers(10, broken=(4, 7)), 5)
    seen, reported = [], []
    for step in train_loader(data, schedule, 0, 0, 2, max_broken=5):
        seen += step.batches["n"][0]["index"].tolist()
        reported += step.broken
    assert reported.count("4.png: is truncated") >= 1 and reported.count("7.png: is truncated") >= 1
    order = [schedule.at("n", p).index for p in range(20)]
    for position, index in enumerate(seen):
        assert index == next(i for i in order[position:] if i not in (4, 7))


def test_broken_samples_are_also_reported_by_workers():
    data, schedule = one_task(Numbers(10, broken=(4, 7)), 5)
    loaders = [train_loader(data, schedule, 0, 0, 4, workers, max_broken=5) for workers in (0, 2)]
    assert same(*[list(loader) for loader in loaders])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_in_a_row_end_the_run_with_a_reason(workers):
    data, schedule = one_task(Numbers(10, broken=tuple(range(10))), 2)
    with pytest.raises(DataError, match=r"task 'n': 4 samples in a row .*is truncated.*max_broken_images") as error:
        list(train_loader(data, schedule, 0, 0, 2, workers, max_broken=3))
    assert "Traceback" not in str(error.value)
    with pytest.raises(DataError, match="none of 2 samples can be read") as error:
        list(eval_loader(Numbers(2, broken=(0, 1)), eval_transform(SIZE), collate, 2, num_workers=workers))
    assert "Traceback" not in str(error.value)


def test_the_first_broken_sample_ends_the_run_if_none_is_allowed():
    data, schedule = one_task(Numbers(10, broken=(4,)), 5)
    with pytest.raises(DataError, match=r"1 samples? .*4\.png: is truncated"):
        list(train_loader(data, schedule, 0, 0, 2, max_broken=0))


def test_a_file_damaged_after_the_check_is_skipped(tmp_path):
    data, schedule = setup(tmp_path)
    file = tmp_path / "a" / "3.jpg"
    file.write_bytes(file.read_bytes()[:200])
    (tmp_path / "b" / "1.jpg").unlink()
    reported = [line for step in train_loader(data, schedule, 0, 0, 5, max_broken=9) for line in step.broken]
    assert {line.split(": ")[0] for line in reported} == {str(file), str(tmp_path / "b" / "1.jpg")}


def test_data_and_schedule_must_agree(tmp_path):
    data, schedule = setup(tmp_path)
    data["a"].batch_size = 9
    with pytest.raises(ValueError, match=r"task 'a': .*\(7, 9, 2\) in data, \(7, 2, 2\) in the schedule"):
        train_loader(data, schedule, 0, 0, 1)
    with pytest.raises(ValueError, match="the schedule has task 'a', data has"):
        train_loader({"b": data["b"]}, schedule, 0, 0, 1)


# ---- evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 12, 13])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("broken", [(), (0, 5, 6)], ids=["intact", "damaged"])
def test_every_sample_is_evaluated_once_and_ranks_stay_in_step(ranks, count, batch, broken):
    dataset = Numbers(count, broken)
    if set(range(count)) <= set(broken):
        with pytest.raises(DataError, match="none of 1 samples can be read"):
            list(eval_loader(dataset, eval_transform(SIZE), collate, batch, 0, ranks))
        return
    found = [list(eval_loader(dataset, eval_transform(SIZE), collate, batch, r, ranks)) for r in range(ranks)]
    assert len({len(batches) for batches in found}) == 1  # equal on every rank
    assert len(found[0]) == math.ceil(math.ceil(count / ranks) / batch)  # and not more than necessary
    counted, reported = [], []
    for item in (item for batches in found for item in batches):
        assert item.count == len(item.samples) <= batch
        rows = item.batch["index"].tolist()
        assert len(rows) == max(1, item.count)  # there is always a sample for the forward pass
        assert rows[: item.count] == [s["index"] for s in item.samples]
        counted += [s["index"] for s in item.samples]
        reported += item.broken
    assert sorted(counted) == [i for i in range(count) if i not in broken]
    assert sorted(reported) == sorted(f"{i}.png: is truncated" for i in broken if i < count)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_original_size_of_samples(tmp_path, workers):
    write_images(tmp_path / "images", 4)
    Image.fromarray(np.zeros((50, 20, 3), dtype=np.uint8)).save(tmp_path / "images" / "1.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {i}\n" for i in range(4)))
    dataset = open_source(ImageListSource(format="image_list", images="images", list="list.txt"), tmp_path)
    batches = list(eval_loader(dataset, eval_transform(SIZE), collate, 3, num_workers=workers))
    sizes = [tuple(s["image"].shape) for b in batches for s in b.samples]
    assert sizes == [(3, 24, 32), (3, 50, 20), (3, 24, 32), (3, 24, 32)]
    assert [b.batch["labels"].tolist() for b in batches] == [[0, 1, 2], [3]]


def test_boxes_and_masks_keep_their_type_through_workers(coco_root):
    from allinone_ds.data.formats.coco import CocoSource

    dataset = open_source(CocoSource(format="coco", images="images", annotations="boxes.json"), coco_root)
    [batch] = eval_loader(dataset, eval_transform(SIZE), detection_collate, 9, num_workers=1)
    for i, sample in enumerate(batch.samples):
        assert type(sample["boxes"]) is type(dataset[i]["boxes"])
        assert torch.equal(sample["boxes"], dataset[i]["boxes"])
        assert sample["boxes"].canvas_size == dataset[i]["boxes"].canvas_size


def detection_collate(samples):
    return {"pixel_values": stack_images(samples)}


# ---- file descriptors


DESCRIPTORS = """
import resource, sys
from tests.data.test_loader import Boxes, count_boxes
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
print(count_boxes(Boxes(600)))
"""


class Boxes(SampleDataset):
    """Samples of detection, whose fields are four tensors."""

    kind = "detection"
    classes = ["a"]

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        boxes = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, 8, 8]]), format="XYXY", canvas_size=(16, 16))
        fields = {"boxes": boxes, "labels": torch.tensor([0]), "iscrowd": torch.tensor([False])}
        return {"image": tv_tensors.Image(torch.zeros(3, 16, 16, dtype=torch.uint8)), **fields, "index": index}


def count_boxes(dataset: SampleDataset) -> tuple[int, int]:
    """Read a dataset in batches of 100 with two workers, first to evaluate and then to train; return both counts."""
    batches = list(eval_loader(dataset, eval_transform(SIZE), DetectionTask.collate, 100, num_workers=2))
    tested = sum(len(sample["boxes"]) for batch in batches for sample in batch.samples)
    data = {"n": TaskData(dataset, eval_transform(SIZE), DetectionTask.collate, 100)}
    schedule = Schedule(0, {"n": len(dataset)}, {"n": (100, 1)}, 1)
    steps = list(train_loader(data, schedule, 0, 0, 6, num_workers=2))
    return tested, sum(len(image["boxes"]) for step in steps for image in step.batches["n"][0]["labels"])


def test_workers_do_not_exhaust_the_file_descriptors():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", DESCRIPTORS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[0] == "(600, 600)", done.stderr[-2000:]


def test_an_image_that_a_transform_refuses_is_replaced_and_named(tmp_path):
    write_images(tmp_path / "images", 4)
    Image.fromarray(np.zeros((5, 6, 3), dtype=np.uint8)).save(tmp_path / "images" / "1.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png 0\n" for i in range(4)))
    dataset = open_source(ImageListSource(format="image_list", images="images", list="list.txt"), tmp_path)
    transform = train_transform([{"Pad": {"padding": 10, "padding_mode": "reflect"}}], SIZE)
    data = {"n": TaskData(dataset, transform, collate, 2)}
    schedule = Schedule(0, {"n": 4}, {"n": (2, 1)}, 1)
    reported = [line for step in train_loader(data, schedule, 0, 0, 4, max_broken=3) for line in step.broken]
    assert set(reported) == {reported[0]}
    assert re.search(r"images/1\.png: Pad\(.*cannot be applied to its 6 x 5 pixels .*change the options", reported[0])
    with pytest.raises(DataError, match=r"1\.png: Pad"):
        list(train_loader(data, schedule, 0, 0, 4, max_broken=0))


def test_what_a_metric_keeps_of_an_evaluation_keeps_no_more():
    [batch] = eval_loader(Boxes(4), eval_transform(SIZE), DetectionTask.collate, 4, num_workers=1)
    for sample in batch.samples:
        assert type(sample["boxes"]) is tv_tensors.BoundingBoxes
        assert sample["boxes"].untyped_storage().nbytes() == sample["boxes"].nbytes


class Fragile(MultiSampleTransform):
    """A step of the user's that cannot handle the image of value 2."""

    def __call__(self, sample, further=None):
        if sample["image"].max() == 2:
            raise KeyError("two")
        return sample


class FragileStep(v2.Transform):
    def forward(self, *inputs):
        return Fragile()(inputs[0] if isinstance(inputs[0], dict) else {"image": inputs[0]})["image"]


def fragile(sample):
    return eval_transform(SIZE)(Fragile()(sample))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (fragile, "2.png: the transform fragile fails on it: KeyError: 'two'"),
        (SampleTransform({"all": (1.0, [FragileStep()])}, SIZE), "2.png: FragileStep() cannot be applied"),
        (
            SampleTransform({"all": (1.0, [Fragile()])}, SIZE),
            "cannot be applied to its 16 x 16 pixels (width x height)",
        ),
    ],
)
def test_any_failure_of_a_transform_is_counted_like_a_broken_image(transform, says, workers):
    data = {"n": TaskData(Numbers(4), transform, collate, 2)}
    schedule = Schedule(0, {"n": 4}, {"n": (2, 1)}, 1)
    steps = list(train_loader(data, schedule, 0, 0, 4, workers, max_broken=3))
    reported = {line for step in steps for line in step.broken}
    assert len(reported) == 1 and says in reported.pop()
    assert 2 not in torch.cat([step.batches["n"][0]["index"] for step in steps]).tolist()
    with pytest.raises(DataError, match="KeyError: 'two'"):
        list(train_loader(data, schedule, 0, 0, 4, workers, max_broken=0))
    if getattr(transform, "branches", None) and isinstance(transform.branches["all"][0], MultiSampleTransform):
        return  # only for training
    batches = list(eval_loader(Numbers(4), transform, collate, 2, num_workers=workers))
    assert [[sample["index"] for sample in batch.samples] for batch in batches] == [[0, 1], [3]]
    assert [batch.batch["index"].tolist() for batch in batches] == [[0, 1], [3]]
    assert says in batches[1].broken[0]
