"""CocoSource with masks and keypoints."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import Tensor

from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.errors import BrokenSample, ConfigError, DataError
from tests.data.tiny_sets import COCO, HEIGHT, WIDTH, coco_content, opened, source, write_images

MASKS = {**COCO, "kind": "instances"}
POINTS = {**COCO, "kind": "keypoints"}
NAMES = ["nose", "left_ear", "right_ear"]
SIZE = (HEIGHT, WIDTH)


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path


def written(root, change, categories=None) -> None:
    content = coco_content()
    for number, record in enumerate(content["annotations"]):
        record["segmentation"] = [[number, 2, number + 8, 2, number + 8, 12, number, 12]]
        record["keypoints"] = [number + 1, 3, 2, number + 2, 5, 1, 0, 0, 0]
        change(number, record)
    for category in content["categories"]:
        category.update({"keypoints": NAMES} if categories is None else categories)
    (root / "boxes.json").write_text(json.dumps(content))


def box_mask(number: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[2:12, number : number + 8] = 1
    return mask


def test_polygons_and_run_lengths_give_the_same_masks(root):
    def change(number, record):
        code = rle.encode(np.asfortranarray(box_mask(number)))
        if number == 1:  # compressed
            record["segmentation"] = {"size": list(SIZE), "counts": code["counts"].decode()}
        if number == 2:  # not compressed, as COCO's crowds are
            flat = box_mask(number).ravel(order="F")
            ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
            counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
            record.update(segmentation={"size": list(SIZE), "counts": counts}, iscrowd=1)
        if number == 3:  # two polygons
            record["segmentation"] = [[3, 2, 7, 2, 7, 12, 3, 12], [7, 2, 11, 2, 11, 12, 7, 12]]

    written(root, change)
    dataset = opened(MASKS, root)
    assert dataset.kind == "instances" and list(dataset.problems()) == [None] * len(dataset)
    for number in range(len(dataset)):
        sample = dataset[number]
        assert np.array_equal(sample["masks"].numpy()[0], box_mask(number)), number
        assert sample["boxes"].shape == (1, 4) and bool(sample["iscrowd"][0]) == (number == 2)


def test_images_without_objects_have_masks_and_points_of_none(root):
    content = coco_content()
    content["annotations"] = []
    for category in content["categories"]:
        category["keypoints"] = NAMES
    (root / "boxes.json").write_text(json.dumps(content))
    assert opened(MASKS, root)[0]["masks"].shape == (0, *SIZE)
    sample = opened(POINTS, root)[0]
    assert sample["keypoints"].shape == (0, 3, 2) and sample["visible"].shape == (0, 3)
    assert target_problems(opened(MASKS, root), SIZE)[0].level == "error"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MASKS, {"segmentation": None}, "annotation 0: has no segmentation; add polygons"),
        (MASKS, {"segmentation": [[1, 2, 3, 4]]}, "at least three points"),
        (MASKS, {"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "must be numbers"),
        (MASKS, {"segmentation": {"size": [9, 9], "counts": [81]}}, "is of 9 x 9 .*, the image of 32 x 24"),
        (MASKS, {"segmentation": {"size": [24, 32], "counts": [5, 6]}}, "covers 11 pixels, its size has 768"),
        (MASKS, {"segmentation": {"counts": [5, 6]}}, "needs 'size'"),
        (MASKS, {"segmentation": {"size": [24, 32], "counts": [-5, 773]}}, "must be whole numbers, 0 or more"),
        (MASKS, {"segmentation": {"size": [24, 32], "counts": [0.5, 767.5]}}, "must be whole numbers, 0 or more"),
        (MASKS, {"segmentation": {"size": [24, 32], "counts": ["a", 767]}}, "must be whole numbers, 0 or more"),
        (MASKS, {"segmentation": [[900, 900, 950, 900, 950, 950]]}, "lies outside of the object's bbox"),
        (POINTS, {"keypoints": [1, 2, 2, 3, 4, 2]}, "annotation 0: keypoints has 2 points, the category has 3"),
        (POINTS, {"keypoints": [1, 2, 2, 3]}, "list of x, y and visibility"),
        (POINTS, {"keypoints": [1, 2, 2, 3, 4, 7, 0, 0, 0]}, "a visibility is 7; allowed are 0"),
        (POINTS, {"keypoints": [1, 2, 2, 3, None, 2, 0, 0, 0]}, "coordinates must be numbers"),
    ],
)
def test_faults_are_named_with_file_and_annotation(root, kind, change, message):
    written(root, lambda n, r: r.update(change) if n == 0 else None)
    with pytest.raises(DataError, match=f"0.png: annotation 0: .*{message.removeprefix('annotation 0: ')}"):
        opened(kind, root)


def test_damaged_run_lengths_break_one_sample(root):
    code = {"size": list(SIZE), "counts": "@@@@"}
    written(root, lambda n, r: r.update(segmentation=code) if n == 0 else None)
    dataset = opened(MASKS, root)
    try:
        sample = dataset[0]
    except BrokenSample as error:
        assert "segmentation" in error.reason
    else:  # pycocotools reads some damaged codes as an empty mask
        assert sample["masks"].shape[1:] == SIZE
    assert dataset[1]["masks"].any()


def test_keypoints_visibility_areas_and_mirrored_order(root):
    def change(number, record):
        record["area"] = 40.5 if number else None
        if number == 2:
            del record["keypoints"]
        if number == 3:
            record["keypoints"][0] = WIDTH + 5

    written(root, change)
    dataset = opened(POINTS, root)
    sample = dataset[1]
    assert sample["keypoints"].as_subclass(Tensor).tolist() == [[[2, 3], [3, 5], [0, 0]]]
    assert sample["visible"].tolist() == [[2, 1, 0]] and sample["visible"].dtype == torch.uint8
    assert sample["area"].tolist() == [40.5] and dataset[0]["area"].tolist() == [80.0]
    assert sample["mirrored"].tolist() == [[0, 2, 1]]
    assert dataset[2]["visible"].tolist() == [[0, 0, 0]] and dataset[3]["visible"].tolist() == [[0, 1, 0]]
    assert any("1 keypoints lie outside" in p.reason for p in dataset.structural)
    assert target_problems(dataset, SIZE) == []
    written(root, lambda n, r: r.update(keypoints=[0] * 9))
    [nothing] = target_problems(opened(POINTS, root), SIZE)
    assert nothing.level == "error" and "none of 7 objects has a visible point" in nothing.reason


@pytest.mark.parametrize(
    ("pairs", "expected", "message"),
    [
        ([], [0, 1, 2], ""),
        ([["nose", 2]], [2, 1, 0], ""),
        ([[0, 5]], None, "5 is no point; allowed are nose, left_ear, right_ear and 0..2"),
        ([[0, 1], [1, 2]], None, "point 1 is in two pairs"),
        ([[1, 1]], None, "point 1 is in two pairs"),
    ],
)
def test_pairs_of_the_config_come_before_names(root, pairs, expected, message):
    written(root, lambda n, r: None)
    config = {**POINTS, "flip_pairs": pairs}
    if expected is None:
        with pytest.raises(DataError, match=message):
            opened(config, root)
    else:
        assert opened(config, root)[0]["mirrored"].tolist() == [expected]


def test_points_without_sides_are_warned_of(root):
    written(root, lambda n, r: None, {"keypoints": ["a", "b", "c"]})
    assert any("none of the 3 points is named left or right" in p.reason for p in opened(POINTS, root).structural)
    assert not any("named left" in p.reason for p in opened({**POINTS, "flip_pairs": []}, root).structural)
    written(root, lambda n, r: None, {"keypoints": []})  # the file does not name them
    assert opened(POINTS, root)[0]["keypoints"].shape == (1, 3, 2)


def test_classes_have_equally_many_points(root):
    written(root, lambda n, r: None)
    content = json.loads((root / "boxes.json").read_text())
    content["categories"][0]["keypoints"] = ["a", "b"]
    (root / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"different numbers of keypoints \(ant 3, bee 3, cow 2\)"):
        opened(POINTS, root)


def test_pairs_belong_to_keypoints():
    with pytest.raises((ConfigError, ValueError), match="flip_pairs is an option of kind keypoints"):
        source({**MASKS, "flip_pairs": []})


def test_keypoints_in_fractions_are_an_error(root):
    written(root, lambda number, record: record.update(keypoints=[0.1, 0.2, 2, 0.5, 0.9, 2, 0, 0, 0]))
    found = [str(p) for p in opened(POINTS, root, strict=False).structural if p.level == "error"]
    assert len(found) == 1 and "all keypoints lie within 0..1, as fractions of the image" in found[0]
