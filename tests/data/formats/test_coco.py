"""CocoSource."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from allinone_ds.data.formats.coco import _different_rows
from allinone_ds.errors import BrokenSample, DataError
from tests.data.tiny_sets import CLASSES, COCO, COUNT, HEIGHT, WIDTH, coco_content, errors, opened, pixels, warnings


def write(root: Path, content: dict) -> None:
    (root / "boxes.json").write_text(json.dumps(content))


def test_boxes_labels_and_crowds(coco_root):
    content = coco_content()
    content["annotations"] += [
        {"id": 50, "image_id": 102, "category_id": 7, "bbox": [1.5, 2.5, 10, 4.25], "iscrowd": 1},
        {"id": 51, "image_id": 102, "category_id": 7, "bbox": [5, 5, 0, 3], "iscrowd": 0},  # no area
        {"id": 52, "image_id": 102, "category_id": 7, "bbox": [-0.5, 0, 33, 24.4], "iscrowd": 0},  # rounding
    ]
    content["annotations"].reverse()  # the order of annotations does not matter
    content["images"].append({"id": 1, "file_name": "empty.png", "width": WIDTH, "height": HEIGHT})
    Image.fromarray(pixels(99)).save(coco_root / "images" / "empty.png")
    write(coco_root, content)
    dataset = opened(COCO, coco_root)
    assert dataset.classes == ["ant", "bee", "cow"] and dataset.category_ids == [7, 20, 90]
    sample = dataset[2]
    rows = sorted(zip(sample["boxes"].tolist(), sample["labels"].tolist(), sample["iscrowd"].tolist(), strict=True))
    assert rows == [
        ([0, 0, WIDTH, HEIGHT], 0, False),
        ([1.5, 2.5, 11.5, 6.75], 0, True),
        ([2, 2, 10, 12], 2, False),
    ]
    assert type(sample["boxes"]) is tv_tensors.BoundingBoxes and sample["boxes"].dtype == torch.float32
    assert sample["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert sample["labels"].dtype == torch.long and sample["iscrowd"].dtype == torch.bool
    empty = dataset[COUNT]
    assert empty["boxes"].shape == (0, 4) and len(empty["labels"]) == len(empty["iscrowd"]) == 0
    assert "has no area" in warnings(COCO, coco_root)


def test_categories_of_a_train_set_without_a_box_are_a_warning(coco_root):
    content = coco_content()
    content["categories"] += [{"id": 91 + i, "name": name} for i, name in enumerate(("dog", "eel"))]
    write(coco_root, content)
    assert "boxes.json: no box has category dog, eel (2 of 5)" in warnings(COCO, coco_root)
    assert opened(COCO, coco_root, classes=[*CLASSES, "dog", "eel"]).structural == []  # a test set may lack some


def test_missing_sizes_are_read_from_the_files(coco_root):
    content = coco_content()
    for record in content["images"]:
        del record["width"], record["height"]
    write(coco_root, content)
    assert opened(COCO, coco_root).sizes.tolist() == [[HEIGHT, WIDTH]] * COUNT
    content["annotations"][0]["bbox"] = [0, 0, 100, 5]
    write(coco_root, content)
    with pytest.raises(DataError, match="outside its image of 32 x 24"):
        opened(COCO, coco_root)


def test_a_test_set_follows_the_class_order_of_its_train_set(coco_root):
    wanted = ["dog", "cow", "bee", "ant"]
    coco = opened(COCO, coco_root, classes=wanted)
    assert coco.classes == wanted and coco.category_ids == [None, 90, 20, 7]
    assert [coco[i]["labels"].item() for i in range(3)] == [3, 2, 1]


def edit_coco(root: Path, change) -> None:
    content = coco_content()
    change(content)
    write(root, content)


COCO_FAULTS = {
    "box outside": (
        lambda c: c["annotations"][1].update(bbox=[20, 2, 20, 5]),
        r"1\.png: box .*20, 2, 40, 7.* outside its image of 32 x 24 .*correct or remove",
    ),
    "category id": (
        lambda c: c["annotations"][1].update(category_id=8),
        r"1\.png: annotation 1: category_id 8 is not among 'categories' \(7, 20, 90\)",
    ),
    "image id": (lambda c: c["annotations"][1].update(image_id=5), "image_id 5 is not among 'images'"),
    "bbox": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\] must be four numbers"),
    "bbox nan": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "must be four numbers"),
    "missing file": (lambda c: c["images"][1].update(file_name="no.png"), r"no\.png: file is missing"),
    "image id twice": (lambda c: c["images"][1].update(id=100), r"1\.png: image id 100 is used twice"),
    "image id of a list": (lambda c: c["images"][1].update(id=[100]), "needs 'id' and 'file_name', the id a number"),
    "image id of an annotation": (lambda c: c["annotations"][1].update(image_id=[1]), r"image_id \[1\] is not among"),
    "category id of a list": (lambda c: c["annotations"][1].update(category_id=[7]), r"category_id \[7\] is not among"),
    "bbox null": (lambda c: c["annotations"][1].update(bbox=None), "bbox None must be four numbers"),
    "bbox huge": (lambda c: c["annotations"][1].update(bbox=[1, 2, 10**400, 3]), "must be four numbers"),
    "annotation null": (lambda c: c["annotations"].append(None), "annotation None must be an object"),
    "zero byte": (lambda c: c["images"][1].update(file_name="a\0b/1.png"), "file is missing"),
    "image record": (lambda c: c["images"][1].pop("file_name"), "needs 'id' and 'file_name'"),
    "empty": (lambda c: c.update(images=[], annotations=[]), "contains no sample"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_a_fault_is_raised_when_opened_and_reported_by_the_check(coco_root, fault):
    change, message = COCO_FAULTS[fault]
    edit_coco(coco_root, change)
    with pytest.raises(DataError, match=message):
        opened(COCO, coco_root)
    assert any(re.search(message, str(p)) for p in errors(COCO, coco_root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"boxes\.json: is not valid json \(line 1"),
        ("[]", "needs the list 'images'"),
        ('{"images": [], "annotations": {}}', "needs the list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "needs 'id' and 'name'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": null}]}', "needs 'id' and 'name'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category id 1 is used twice",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "class names are used more than once: a",
        ),
    ],
)
def test_a_json_that_is_not_coco_is_refused(coco_root, text, message):
    (coco_root / "boxes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(COCO, coco_root)
    assert any(re.search(message, str(p)) for p in errors(COCO, coco_root))


def test_all_faults_are_raised_together(coco_root):
    edit_coco(coco_root, lambda c: [a.update(bbox=[0, 0, 99, 5]) for a in c["annotations"]])
    with pytest.raises(DataError, match=f"{COUNT} problems in the data") as caught:
        opened(COCO, coco_root)
    assert len(caught.value.problems) == COUNT


def test_an_image_whose_size_differs_from_the_json_is_broken(coco_root):
    edit_coco(coco_root, lambda c: c["images"][1].update(width=WIDTH + 9))
    dataset = opened(COCO, coco_root)
    with pytest.raises(BrokenSample, match=r"1\.png: is 32 x 24 .*boxes\.json says 41 x 24"):
        dataset[1]
    assert len(errors(COCO, coco_root)) == 1


def test_boxes_in_fractions_of_the_image_are_refused(coco_root):
    content = coco_content()
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        record["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
    write(coco_root, content)
    with pytest.raises(DataError, match=r"boxes.json: all boxes lie within 0\.\.1, as fractions of the image"):
        opened(COCO, coco_root)


def test_repeated_boxes_are_a_warning(coco_root):
    content = coco_content()
    content["annotations"] += [{**record, "id": 100 + record["id"]} for record in content["annotations"][:2]]
    write(coco_root, content)
    assert "boxes.json: 2 boxes repeat another box" in warnings(COCO, coco_root) and errors(COCO, coco_root) == []


def test_equal_rows_are_counted_like_numpy_counts_them():
    rng = np.random.default_rng(0)
    for rows in (rng.integers(0, 3, (500, 6)).astype(float), rng.random((200, 6)), np.array([[0.0] * 6, [-0.0] * 6])):
        assert _different_rows(rows) == len(np.unique(rows, axis=0))
    assert _different_rows(np.empty((0, 6))) == 0


def test_one_fault_among_the_annotations_changes_no_other_box(coco_root):
    expected = opened(COCO, coco_root)
    content = coco_content()
    content["annotations"] += [{"id": 99, "image_id": 100, "category_id": 7, "bbox": [1, 2, "3", 4]}, "no object"]
    write(coco_root, content)
    found = opened(COCO, coco_root, strict=False)
    assert [p.reason.partition(":")[0] for p in found.structural] == [
        "annotation 99",
        "annotation 'no object' must be an object",
    ]
    for index in range(COUNT):
        for key in ("boxes", "labels", "iscrowd"):
            assert found[index][key].tolist() == expected[index][key].tolist()


@pytest.mark.parametrize(("stated", "crowd"), [("0", False), ("1", True), (None, False), (True, True)])
def test_iscrowd_may_be_a_number_a_string_or_a_bool(coco_root, stated, crowd):
    content = coco_content()
    for record in content["annotations"]:
        record["iscrowd"] = stated
    write(coco_root, content)
    assert opened(COCO, coco_root)[0]["iscrowd"].tolist() == [crowd]


@pytest.mark.parametrize(("identity", "message"), [("7", "both numbers and strings"), ([7], "needs 'id'")])
def test_category_ids_that_cannot_be_ordered_are_refused(coco_root, identity, message):
    content = coco_content()
    content["categories"][1]["id"] = identity
    write(coco_root, content)
    with pytest.raises(DataError, match=message):
        opened(COCO, coco_root)
