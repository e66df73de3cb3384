"""What can be learned is counted: nothing is an error, a lost part is a warning with numbers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from allinone_ds.data.base import SampleDataset
from allinone_ds.data.check import check_sources
from allinone_ds.data.inspection.targets import spread, target_problems
from allinone_ds.errors import BrokenSample
from tests.data.tiny_sets import COCO, COUNT, FOLDERS, HEIGHT, MAPS, WIDTH, coco_content, opened, source, write_images

SIZE = (HEIGHT, WIDTH)


def boxes(root, change, size=SIZE, **options) -> list[tuple[str, str]]:
    content = coco_content()
    for number, record in enumerate(content["annotations"]):
        change(number, record)
    (root / "boxes.json").write_text(json.dumps(content))
    return [(p.level, p.reason) for p in target_problems(opened(COCO, root), size, **options)]


def test_usual_boxes_need_no_word(coco_root):
    assert boxes(coco_root, lambda n, r: None) == []
    assert boxes(coco_root, lambda n, r: r.update(iscrowd=int(n == 0))) == []  # a few crowds are usual


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"bbox": [20, 20, -8, -10]}, SIZE, "of 7 boxes, 7 have no area or a negative size"),
        ({"bbox": [20, 20, 8, 0]}, SIZE, "of 7 boxes, 7 have no area"),
        ({"iscrowd": 1}, SIZE, "of 7 boxes, 7 are crowds"),
        ({"bbox": [4, 4, 3, 10]}, (8, 8), r"of 7 boxes, 7 are smaller than 1 pixel at the image_size 8 x 8"),
    ],
)
def test_nothing_to_learn_from_is_an_error(coco_root, change, size, message):
    [(level, reason)] = boxes(coco_root, lambda n, r: r.update(change), size)
    assert level == "error" and message in reason and "nothing can be learned" in reason
    assert boxes(coco_root, lambda n, r: r.update(change), size, train=False)[0][0] == "warning"


def test_a_lost_part_is_a_warning_with_numbers(coco_root):
    def change(number, record):
        record.update([{"bbox": [20, 20, -8, 4]}, {"iscrowd": 1}, {"bbox": [1, 1, 0.5, 9]}, {}][min(number, 3)])

    found = boxes(coco_root, change)
    assert [level for level, _ in found] == ["warning"]
    assert found[0][1] == (
        "3 of 7 boxes are not used in training: 1 have no area or a negative size, 1 are crowds, 1 are smaller than 1 "
        "pixel at the image_size 24 x 32 (height x width)"
    )


def test_the_counts_equal_what_the_transforms_leave(coco_root):
    from allinone_ds.data.augmentation.transforms import eval_transform

    rng = np.random.default_rng(0)

    def change(number, record):
        x, y, w, h = rng.uniform(0, 20), rng.uniform(0, 15), rng.uniform(-2, 8), rng.uniform(-2, 8)
        record.update(bbox=[x, y, w, h], iscrowd=int(rng.random() < 0.2))

    for size in ((8, 8), (4, 64), (24, 32)):
        found = str(boxes(coco_root, change, size))
        dataset = opened(COCO, coco_root)
        left = [eval_transform(size)(dataset[i]) for i in range(COUNT)]
        usable = sum(int((~sample["iscrowd"]).sum()) for sample in left)
        assert 0 < usable < COUNT and f"{COUNT - usable} of {COUNT} boxes are not used" in found


def test_images_without_any_box(coco_root):
    (coco_root / "boxes.json").write_text(json.dumps({**coco_content(), "annotations": []}))
    [problem] = target_problems(opened(COCO, coco_root), SIZE)
    assert problem.level == "error" and "there is no box" in problem.reason


# ---- label maps


def write_maps(root, values) -> None:
    for i, value in enumerate(values):
        Image.fromarray(np.full((HEIGHT, WIDTH), value, dtype=np.uint8)).save(root / "maps" / f"{i}.png")


def test_label_maps_without_a_class(maps_root):
    dataset = opened(MAPS, maps_root)
    assert target_problems(dataset, SIZE) == []
    write_maps(maps_root, [255, 255])
    [problem] = target_problems(dataset, SIZE)
    assert problem.level == "warning"
    assert "2 of 7 label maps that were read have no pixel of a class" in problem.reason
    write_maps(maps_root, [255] * COUNT)
    [problem] = target_problems(dataset, SIZE)
    assert problem.level == "error" and "none of 7 label maps has a pixel of a class" in problem.reason


def test_a_single_class_and_classes_that_do_not_occur(maps_root):
    write_maps(maps_root, [1] * COUNT)
    reasons = [p.reason for p in target_problems(opened(MAPS, maps_root), SIZE)]
    assert "no label map has a pixel of class ant, cow (2 of 3)" in reasons[0]
    assert reasons[1].startswith("only class 'bee' occurs, so there is nothing to tell apart")
    assert target_problems(opened(MAPS, maps_root), SIZE, train=False) == []


# ---- a few of many


class Maps(SampleDataset):
    """Label maps of which only some hold a class."""

    kind = "segmentation"
    classes = ["a", "b"]
    name = "maps"

    def __init__(self, count, usable):
        self.count, self.usable, self.reads = count, usable, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        if index == 0:
            raise BrokenSample("0.png", "is truncated")
        mask = torch.tensor([[0, 1]] if index in self.usable else [[255, 255]], dtype=torch.uint8)
        return {"image": tv_tensors.Image(torch.zeros(3, 1, 2, dtype=torch.uint8)), "mask": tv_tensors.Mask(mask)}


def test_large_sets_are_sampled_and_the_numbers_say_so():
    many = Maps(100_000, range(100_000))
    assert target_problems(many, SIZE) == [] and many.reads == 64
    some = Maps(100_000, range(50_000, 100_000))
    [problem] = target_problems(some, SIZE)
    assert some.reads == 64 and "31 of 63 label maps that were read" in problem.reason
    none = Maps(100_000, ())
    [problem] = target_problems(none, SIZE)
    assert none.reads == 1064 and problem.level == "error"
    assert "none of 999 label maps has a pixel" in problem.reason
    assert "(in 999 of 100000 samples, evenly spaced)" in problem.reason
    rare = Maps(100_000, range(0, 100_000, 10))
    assert target_problems(rare, SIZE)[0].level == "warning"


def test_spread_has_both_ends():
    assert spread(5, 64) == [0, 1, 2, 3, 4] and spread(1, 64) == [0]
    assert spread(1000, 3) == [0, 499, 999]


def test_the_check_counts_what_can_be_learned(coco_root, folders_root):
    content = coco_content()
    for record in content["annotations"]:
        record["iscrowd"] = 1
    (coco_root / "boxes.json").write_text(json.dumps(content))
    sources = {"train": source(COCO), "test": source(COCO)}
    found = check_sources(sources, coco_root, progress=False, classes_of={"test": "train"})
    assert [p.level for p in found if "nothing can be learned" in p.reason] == ["error", "warning"]


def test_the_check_knows_the_image_size(coco_root):
    found = check_sources({"it": source(COCO)}, coco_root, progress=False, image_sizes={"it": (2, 3)})
    assert "smaller than 1 pixel at the image_size 2 x 3" in str(found[0]) and found[0].level == "error"


def test_custom_kinds_and_targets_of_another_form_are_not_counted(folders_root):
    dataset = opened(FOLDERS, folders_root)
    dataset.labels = [torch.tensor([0.0, 1.0])] * len(dataset)
    assert target_problems(dataset, SIZE) == []
    dataset.kind = "depth"
    assert target_problems(dataset, SIZE) == []


def test_a_single_class_of_images_is_a_warning(tmp_path):
    write_images(tmp_path / "images" / "cat", 3)
    [problem] = target_problems(opened(FOLDERS, tmp_path), SIZE)
    assert problem.level == "warning" and "only class 'cat' occurs" in problem.reason


def test_classes_that_differ_only_in_how_they_are_written_are_a_warning(tmp_path):
    for name in ("Cat ", "cat", "big-dog", "Big Dog", "cow"):
        write_images(tmp_path / "images" / name, 1)
    problems = target_problems(opened(FOLDERS, tmp_path), SIZE)
    [reason] = [p.reason for p in problems if "several ways" in p.reason]
    assert "2 classes are written" in reason and "'Cat ' = 'cat'" in reason and "'Big Dog' = 'big-dog'" in reason
    assert not any("several ways" in p.reason for p in target_problems(opened(FOLDERS, tmp_path), SIZE, train=False))
