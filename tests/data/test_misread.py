"""Annotations that would be read without an error as something else."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_hub import opened as opened_hub
from test_hub import save, save_boxes
from test_sources import COCO, MAPS, errors, opened, warned
from tiny_sets import CLASSES, COUNT, HEIGHT, WIDTH, coco_content, pixels

from allinone_ds.errors import BrokenSample, DataError

datasets = pytest.importorskip("datasets")


def write(root, content):
    (root / "boxes.json").write_text(json.dumps(content))


def test_boxes_in_parts_of_the_picture_are_refused(coco_root, tmp_path):
    content = coco_content()
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        record["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    write(coco_root, content)
    with pytest.raises(DataError, match=r"boxes.json: the boxes lie within 0\.\.1, as parts of the picture"):
        opened(COCO, coco_root)
    save_boxes(tmp_path, [[[0.1, 0.1, 0.5, 0.5]], [], [[0.0, 0.0, 1.0, 1.0]] * 2, [[0.0, 0.0, 0.0, 0.0]]])
    dataset = opened_hub(tmp_path, "detection")
    for index in (0, 2):
        with pytest.raises(BrokenSample, match="parts of the picture"):
            dataset[index]
    assert len(dataset[3]["boxes"]) == 0  # no area: a box that stands for nothing


def test_boxes_listed_twice_are_told(coco_root):
    content = coco_content()
    content["annotations"] += [{**record, "id": 100 + record["id"]} for record in content["annotations"][:2]]
    write(coco_root, content)
    assert "boxes.json: 2 boxes stand there twice" in warned(COCO, coco_root) and errors(COCO, coco_root) == []


@pytest.mark.parametrize(("stated", "crowd"), [("0", False), ("1", True), (None, False), (True, True)])
def test_crowds_may_be_stated_in_other_types(coco_root, stated, crowd):
    content = coco_content()
    for record in content["annotations"]:
        record["iscrowd"] = stated
    write(coco_root, content)
    assert opened(COCO, coco_root)[0]["iscrowd"].tolist() == [crowd]


@pytest.mark.parametrize(("identity", "message"), [("7", "numbers and texts"), ([7], "needs 'id'")])
def test_category_ids_that_cannot_be_ordered_are_named(coco_root, identity, message):
    content = coco_content()
    content["categories"][1]["id"] = identity
    write(coco_root, content)
    with pytest.raises(DataError, match=message):
        opened(COCO, coco_root)


@pytest.mark.parametrize("layout", ["dict", "list"])
def test_crowds_of_a_datasets_source_are_crowds(tmp_path, layout):
    label, number = datasets.ClassLabel(names=CLASSES), datasets.Value("float32")
    picture = Image.fromarray(pixels(0))
    if layout == "dict":
        inner = {"bbox": datasets.List(datasets.List(number)), "category": datasets.List(label),
                 "iscrowd": datasets.List(datasets.Value("bool"))}  # fmt: skip
        row = {
            "bbox": [[1, 1, 4, 4], [2, 2, 0, 0], [3, 3, 9, 9]],
            "category": [0, 1, 2],
            "iscrowd": [False, False, True],
        }
    else:
        inner = datasets.List({"bbox": datasets.List(number), "category": label, "iscrowd": datasets.Value("bool")})
        row = [
            {"bbox": [1, 1, 4, 4], "category": 0, "iscrowd": False},
            {"bbox": [3, 3, 9, 9], "category": 2, "iscrowd": True},
        ]
    save(tmp_path, {"image": datasets.Image(), "objects": inner}, {"image": [picture], "objects": [row]})
    sample = opened_hub(tmp_path, "detection")[0]
    assert sample["labels"].tolist() == [0, 2] and sample["iscrowd"].tolist() == [False, True]


def test_coco_boxes_read_as_pascal_are_broken(tmp_path):
    save_boxes(
        tmp_path, [[[20.0, 10.0, 5.0, 5.0]], [], [[0.0, 0.0, 4.0, 4.0]] * 2, []], categories=[[0], [], [1, 2], []]
    )
    with pytest.raises(BrokenSample, match="set bbox_format"):
        opened_hub(tmp_path, "detection", bbox_format="pascal")[0]


def test_label_maps_of_0_and_255_for_two_classes_are_told(maps_root, tmp_path):
    assert warned(MAPS, maps_root) == ""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:9] = 255
    for i in range(COUNT):
        Image.fromarray(mask).save(maps_root / "maps" / f"{i}.png")
    assert "no class but 'ant', all else is 255, which is ignored" in warned(MAPS, maps_root)
    assert warned({**MAPS, "classes": ["ant"]}, maps_root) == ""  # one class and an ignored rest is a task
    assert set(opened(MAPS, maps_root)[0]["mask"].unique().tolist()) == {0, 255}
    rows = {"image": [Image.fromarray(pixels(0))], "label": [Image.fromarray(mask)]}
    save(tmp_path, {"image": datasets.Image(), "label": datasets.Image()}, rows)
    told = [str(p) for p in opened_hub(tmp_path, "segmentation", classes=CLASSES).structural]
    assert len(told) == 1 and "which is ignored" in told[0]


def test_masks_of_one_bit_are_classes_0_and_1(maps_root):
    for i in range(COUNT):
        Image.fromarray(pixels(i)[..., 0] > 128).save(maps_root / "maps" / f"{i}.png")
    assert torch.unique(opened(MAPS, maps_root)[0]["mask"]).tolist() == [0, 1]
