"""Test images that are training images, and 16-bit images of different depths, are reported with numbers."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from allinone_ds.data.check import check_sources
from allinone_ds.data.inspection import files
from allinone_ds.data.inspection.files import depths_at_start, overlap_at_start
from tests.data.tiny_sets import CLASSES, COCO, COUNT, FOLDERS, LIST, MAPS, coco_content, opened, source, write_images

DATASETS = {"format": "datasets", "path": "set", "kind": "classification"}


@pytest.fixture
def rows_root(tmp_path, list_root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {
        "image": [str(list_root / "images" / f"{i}.png") for i in range(COUNT)],
        "label": [i % 3 for i in range(COUNT)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    return tmp_path


def overlaps(train, test, root, large, monkeypatch) -> set[tuple[str, str]]:
    """What the check reports, which must agree with the start of a run in levels and counts."""
    if large:
        monkeypatch.setattr(files, "_SMALL", 0)
    at_start = overlap_at_start(opened(train, root), opened(test, root))
    checked = check_sources({"a": source(train), "b": source(test)}, root, False, classes_of={"b": "a"})
    checked = [p for p in checked if "also training images" in p.reason]
    assert [(p.level, p.reason.split(" (")[0]) for p in at_start] == [
        (p.level, p.reason.split(" (")[0]) for p in checked
    ]
    return {(p.level, p.reason.split(" (")[0]) for p in at_start}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("config", "fixture"),
    [(COCO, "coco_root"), (MAPS, "maps_root"), (LIST, "list_root"), (FOLDERS, "folders_root"), (DATASETS, "rows_root")],
)
def test_equal_train_and_test_data_is_an_error(config, fixture, large, request, monkeypatch):
    root = request.getfixturevalue(fixture)
    count = 6 if config is FOLDERS else COUNT
    equal = {("error", f"all {count} test images are also training images")}
    assert overlaps(config, config, root, large, monkeypatch) == equal


@pytest.mark.parametrize("large", [False, True])
def test_a_part_is_a_warning_with_numbers(list_root, large, monkeypatch):
    (list_root / "train.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in range(5)))
    (list_root / "test.txt").write_text("".join(f"./{i}.png {i % 3}\n" for i in range(3, 7)))
    train, test = ({**LIST, "list": f"{part}.txt"} for part in ("train", "test"))
    found = overlaps(train, test, list_root, large, monkeypatch)
    assert found == {("warning", "2 of 4 test images are also training images")}


def test_parts_of_one_saved_dataset_do_not_overlap(rows_root):
    train, test = (opened({**DATASETS, "split": f"train[{part}]"}, rows_root) for part in (":4", "4:"))
    assert overlap_at_start(train, test) == []
    assert "3 of 4" in str(overlap_at_start(train, opened({**DATASETS, "split": "train[1:5]"}, rows_root))[0])


def test_copies_are_found_by_their_content(coco_root):
    shutil.copytree(coco_root / "images", coco_root / "copies")
    (coco_root / "copies" / "0.png").write_bytes((coco_root / "copies" / "0.png").read_bytes() + b"0")
    test = {**COCO, "images": "copies"}
    [problem] = overlap_at_start(opened(COCO, coco_root), opened(test, coco_root))
    assert problem.level == "warning" and "6 of 7 test images are also training images" in problem.reason
    assert "copies/1.png = " in problem.reason and "images/1.png" in problem.reason


@pytest.mark.parametrize("large", [False, True])
def test_links_to_one_folder_are_the_same_images(folders_root, large, monkeypatch):
    (folders_root / "test").symlink_to("images")
    found = overlaps(FOLDERS, {**FOLDERS, "images": "test"}, folders_root, large, monkeypatch)
    assert found == {("error", "all 6 test images are also training images")}


def test_equal_ids_and_names_in_different_folders_do_not_overlap(coco_root):
    write_images(coco_root / "other", COUNT + 9)
    for i in range(COUNT):
        (coco_root / "other" / f"{i + 9}.png").rename(coco_root / "other" / f"{i}.png")
    (coco_root / "test.json").write_text(json.dumps(coco_content()))
    test = {**COCO, "images": "other", "annotations": "test.json"}
    train = opened(COCO, coco_root)
    assert not any("also" in p.reason for p in overlap_at_start(train, opened(test, coco_root)))


def test_images_of_different_depths_are_a_warning(list_root):
    for i in range(COUNT):
        bits = 10 if i == 2 else 12
        values = np.random.default_rng(i).integers(0, 2**bits, (24, 32)).astype(np.uint16)
        values[0, 0] = 2**bits - 1
        Image.fromarray(values).save(list_root / "images" / f"{i}.png")
    [at_start] = depths_at_start(opened(LIST, list_root))
    assert at_start.level == "warning" and "10 bits in 1, 12 bits in 6 images" in at_start.reason
    checked = check_sources({"it": source(LIST)}, list_root, progress=False)
    assert at_start in checked
    Image.fromarray(np.full((24, 32), 4095, dtype=np.uint16)).save(list_root / "images" / "2.png")
    assert depths_at_start(opened(LIST, list_root)) == []


def test_turned_images_of_equal_size_are_a_warning(coco_root, list_root):
    exif = Image.Exif()
    for i, orientation in enumerate((1, 2, 3, 4)):
        exif[0x0112] = orientation
        Image.open(coco_root / "images" / f"{i}.png").save(coco_root / "images" / f"{i}.png", exif=exif)
    [problem] = check_sources({"it": source(COCO)}, coco_root, progress=False)
    assert problem.level == "warning" and "3 of 7 images are turned by 180 degrees or mirrored" in problem.reason
    assert "images/1.png" in problem.reason
    assert check_sources({"it": source(LIST)}, list_root, progress=False) == []  # a class belongs to both
