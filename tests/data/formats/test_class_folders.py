"""ClassFoldersSource."""

from pathlib import Path

import pytest
from PIL import Image

from allinone_ds.errors import DataError
from tests.data.tiny_sets import CLASSES, FOLDERS, opened, pixels, warnings, write_images


def test_classes_are_numbered_in_the_order_of_their_names(folders_root):
    (folders_root / "images" / "bee" / "deeper").mkdir()
    Image.fromarray(pixels(9)).save(folders_root / "images" / "bee" / "deeper" / "x.jpg")
    (folders_root / "images" / "bee" / ".ipynb_checkpoints").mkdir()  # a copy that an editor keeps
    Image.fromarray(pixels(9)).save(folders_root / "images" / "bee" / ".ipynb_checkpoints" / "x-checkpoint.jpg")
    dataset = opened(FOLDERS, folders_root)
    assert len(dataset) == 7
    assert [Path(dataset.path(i)).relative_to(folders_root / "images").parts[0] for i in range(7)] == [
        CLASSES[dataset[i]["label"]] for i in range(7)
    ]


def test_a_test_set_may_lack_classes_but_not_add_any(folders_root):
    for name in ("ant", "bee"):
        for file in (folders_root / "images" / name).iterdir():
            file.unlink()
        (folders_root / "images" / name).rmdir()
    dataset = opened(FOLDERS, folders_root, classes=CLASSES)
    assert {dataset[i]["label"] for i in range(len(dataset))} == {2} and dataset.classes == CLASSES
    with pytest.raises(DataError, match="class 'cow' is not in the train set.*allowed: ant, crow"):
        opened(FOLDERS, folders_root, classes=["ant", "crow"])


def test_empty_folders_are_errors(folders_root):
    (folders_root / "images" / "dog").mkdir()
    with pytest.raises(DataError, match="dog: class folder contains no image"):
        opened(FOLDERS, folders_root)
    (folders_root / "none").mkdir()
    with pytest.raises(DataError, match="none: contains no class folder"):
        opened({**FOLDERS, "images": "none"}, folders_root)


def test_folders_named_as_parts_of_a_data_set_are_no_classes(folders_root):
    folder = folders_root / "images"
    (folder / "ant").rename(folder / "train")
    (folder / "bee").rename(folder / "Val")
    assert "class folders Val, train are named as parts of a data set are" in warnings(FOLDERS, folders_root)
    (folder / "cow").rename(folder / "test")
    with pytest.raises(DataError, match="named Val, test, train, as parts of a data set are; .*images/Val"):
        opened(FOLDERS, folders_root)


def test_a_single_class_is_a_warning(folders_root):
    write_images(folders_root / "one" / "cat", 2)
    assert "only class 'cat' occurs, so there is nothing to tell apart" in warnings(
        {**FOLDERS, "images": "one"}, folders_root
    )
