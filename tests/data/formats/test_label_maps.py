"""LabelMapsSource."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from allinone_ds.errors import BrokenSample, DataError
from tests.data.tiny_sets import CLASSES, COUNT, HEIGHT, MAPS, WIDTH, errors, opened, pixels, warnings


def test_masks_keep_class_ids_and_255(maps_root):
    dataset = opened(MAPS, maps_root)
    for i in range(COUNT):
        mask = dataset[i]["mask"]
        assert type(mask) is tv_tensors.Mask and mask.dtype == torch.uint8
        assert np.array_equal(mask.numpy(), np.array(Image.open(maps_root / "maps" / f"{i}.png")))


def test_a_different_ignore_index_becomes_255(maps_root):
    for file in (maps_root / "maps").iterdir():
        stored = np.array(Image.open(file)).astype(np.uint16)
        Image.fromarray(np.where(stored == 255, 1000, stored).astype(np.uint16)).save(file)
    dataset = opened({**MAPS, "ignore_index": 1000}, maps_root)
    assert set(np.unique(dataset[0]["mask"])) == {0, 1, 2, 255}


def test_ids_may_start_at_1_with_0_for_no_class_as_in_ade20k(maps_root):
    expected = opened(MAPS, maps_root)[0]["mask"]
    for file in (maps_root / "maps").iterdir():
        stored = np.array(Image.open(file))
        Image.fromarray((stored + 1).astype(np.uint8)).save(file)  # 255 becomes 0
    dataset = opened({**MAPS, "ignore_index": 0, "first_id": 1}, maps_root)
    assert torch.equal(dataset[0]["mask"], expected) and set(expected.unique().tolist()) == {0, 1, 2, 255}
    with pytest.raises(DataError, match="3 classes with ids from 1, and ignore_index 3"):
        opened({**MAPS, "ignore_index": 3, "first_id": 1}, maps_root)
    two_classes = opened({**MAPS, "ignore_index": 0, "first_id": 1, "classes": CLASSES[:2]}, maps_root)
    assert "allowed are 1..2 and 0" in two_classes.check(0)[0].reason


def test_images_and_maps_may_have_different_suffixes_as_in_cityscapes(maps_root):
    for kind, end in (("images", "_leftImg8bit"), ("maps", "_gtFine_labelTrainIds")):
        for file in list((maps_root / kind).iterdir()):
            folder = maps_root / kind / "aachen"
            folder.mkdir(exist_ok=True)
            file.rename(folder / f"{file.stem}{end}{file.suffix}")
    (maps_root / "maps" / "aachen" / "0_gtFine_color.png").write_bytes(b"a different type of map")
    suffixes = {"image_suffix": "_leftImg8bit", "label_map_suffix": "_gtFine_labelTrainIds"}
    dataset = opened({**MAPS, **suffixes}, maps_root)
    assert len(dataset) == COUNT and dataset.path(0).endswith("aachen/0_leftImg8bit.png")
    assert [problem.level for problem in dataset.structural] == ["warning"]  # the color map is not used
    with pytest.raises(DataError, match="has no label map .*0_leftImg8bit_gtFine_labelTrainIds.png"):
        opened({**MAPS, "label_map_suffix": "_gtFine_labelTrainIds"}, maps_root)


def test_a_test_set_follows_the_class_order_of_its_train_set(maps_root):
    dataset = opened(MAPS, maps_root, classes=CLASSES[::-1])
    stored = np.array(Image.open(maps_root / "maps" / "0.png"))
    assert np.array_equal(dataset[0]["mask"].numpy(), np.array([2, 1, 0] + [0] * 252 + [255])[stored])


def test_a_label_map_of_wrong_size_or_with_unknown_ids_is_broken(maps_root):
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8)).save(maps_root / "maps" / "2.png")
    stored = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    stored[:2, :3] = 3
    Image.fromarray(stored).save(maps_root / "maps" / "4.png")
    dataset = opened(MAPS, maps_root)
    with pytest.raises(BrokenSample, match=r"maps/2\.png: is 33 x 24 .*, its image is 32 x 24"):
        dataset[2]
    with pytest.raises(BrokenSample, match=r"maps/4\.png: contains 3 in 6 pixels; allowed are 0\.\.2 and 255"):
        dataset[4]
    assert [Path(p.file).name for p in errors(MAPS, maps_root)] == ["2.png", "4.png"]


def test_images_without_map_and_maps_without_image_are_errors(maps_root):
    (maps_root / "maps" / "2.png").unlink()
    (maps_root / "images" / "4.png").unlink()
    with pytest.raises(DataError, match=r"(?s)images/2\.png: has no label map.*maps/4\.png: has no image"):
        opened(MAPS, maps_root)
    assert len(errors(MAPS, maps_root)) == 2


def test_two_images_of_one_stem_are_an_error(maps_root):
    Image.fromarray(pixels(0)).save(maps_root / "images" / "0.jpg")
    with pytest.raises(DataError, match=r"0\.jpg: differs only in its suffix from 0\.png"):
        opened(MAPS, maps_root)


@pytest.mark.parametrize("options", [{"classes": []}, {"ignore_index": 2}, {"classes": [str(i) for i in range(256)]}])
def test_impossible_classes_of_label_maps_are_refused(maps_root, options):
    with pytest.raises(DataError, match="give 1 to 255 classes, and an ignore_index"):
        opened({**MAPS, **options}, maps_root)


def test_two_classes_stored_as_0_and_255_are_a_warning(maps_root):
    assert warnings(MAPS, maps_root) == ""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:9] = 255
    for i in range(COUNT):
        Image.fromarray(mask).save(maps_root / "maps" / f"{i}.png")
    assert "no class but 'ant'; all other pixels are 255, which is ignored" in warnings(MAPS, maps_root)
    alone = warnings({**MAPS, "classes": ["ant"]}, maps_root)  # such a task has no other class to tell it from
    assert "which is ignored" not in alone and "only class 'ant' occurs" in alone
    assert set(opened(MAPS, maps_root)[0]["mask"].unique().tolist()) == {0, 255}


def test_label_maps_of_one_bit_hold_classes_0_and_1(maps_root):
    for i in range(COUNT):
        Image.fromarray(pixels(i)[..., 0] > 128).save(maps_root / "maps" / f"{i}.png")
    assert torch.unique(opened(MAPS, maps_root)[0]["mask"]).tolist() == [0, 1]


def test_class_ids_that_do_not_count_up(maps_root):
    """Two classes stored as 0 and 255, and ids in any order, equal the same ids counted up."""
    stored = np.array(Image.open(maps_root / "maps" / "0.png"))  # 0, 1, 2 and 255
    given = {**MAPS, "class_ids": [255, 2, 0], "ignore_index": 1}
    mask = opened(given, maps_root)[0]["mask"].numpy()
    expected = np.select([stored == 255, stored == 2, stored == 0], [0, 1, 2], 255)
    assert np.array_equal(mask, expected) and mask.dtype == np.uint8
    for file in (maps_root / "maps").iterdir():
        Image.fromarray(np.where(stored > 1, 255, 0).astype(np.uint8)).save(file)
    binary = {**MAPS, "classes": ["sound", "crack"], "class_ids": [0, 255]}
    assert np.array_equal(opened(binary, maps_root)[0]["mask"].numpy(), stored > 1)
    assert errors(binary, maps_root) == [] and "ignored" not in warnings(binary, maps_root)
    reordered = opened(binary, maps_root, classes=["crack", "sound"])  # of a train set
    assert np.array_equal(reordered[0]["mask"].numpy(), stored <= 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_ids": [0, 2]}, "class_ids has 2 ids for 3 classes"),
        ({"class_ids": [0, 2, 2]}, r"class_ids has 3 ids for 3 classes \(2 more than once\); give each class one id"),
        ({"class_ids": [0, 1, 9]}, r"contains 2 in \d+ pixels; allowed are 0, 1, 9 and 255"),
        ({"class_ids": [0, 1, 2], "first_id": 1}, "'class_ids' and 'first_id' are both set"),
        ({"class_ids": [0, 1, -2]}, "-2: give a whole number of 0 or more, or a list of such numbers"),
        ({"class_ids": [0, [1, 0], 2]}, r"class_ids has 3 ids for 3 classes \(0 more than once\)"),
        ({"class_ids": [0, [], 2]}, "give each class one id, or a list of ids of its own"),
        ({"class_ids": [0, [1, 9], 7], "ignore_index": [5, 255]}, r"allowed are 0, 1, 7, 9 and 5, 255 \(ignore\)"),
        ({"ignore_index": [255, 2]}, "ignore_index 255, 2; .* an ignore_index that is not a class id"),
    ],
)
def test_class_ids_that_do_not_fit_are_refused(maps_root, options, message):
    with pytest.raises((DataError, BrokenSample, ValueError), match=message):
        opened({**MAPS, **options}, maps_root)[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_several_ids_of_one_class_and_several_values_without_a_class(maps_root, dtype):
    stored = {file: np.array(Image.open(file)) for file in (maps_root / "maps").iterdir()}  # 0, 1, 2 and 255
    for file, values in stored.items():
        name = file.with_suffix(".png" if dtype == np.uint8 else ".tif")
        file.unlink()
        Image.fromarray(np.where(values == 255, 7, values).astype(dtype)).save(name)
    merged = {**MAPS, "classes": ["one", "rest"], "class_ids": [1, [2, 300, 0]], "ignore_index": [255, 7]}
    mask = opened(merged, maps_root)[0]["mask"].numpy()
    own = stored[maps_root / "maps" / "0.png"]
    assert np.array_equal(mask, np.select([own == 1, own == 255], [0, 255], 1)) and mask.dtype == np.uint8
    assert errors(merged, maps_root) == []


COLORS = np.array([[0, 0, 0], [0, 130, 200], [255, 0, 10], [9, 9, 9]], dtype=np.uint8)
CODED = {**MAPS, "class_colors": ["#000000", [0, 130, 200], "#FF000a"], "ignore_colors": [[9, 9, 9]]}


@pytest.fixture
def colored_root(maps_root):
    """The label maps of ids in colours, the ignored pixels in grey; and the ids."""
    ids = {}
    for file in sorted((maps_root / "maps").iterdir()):
        ids[file.stem] = np.array(Image.open(file))
        Image.fromarray(COLORS[np.where(ids[file.stem] == 255, 3, ids[file.stem])]).save(file)
    return maps_root, ids


def test_colours_are_the_classes(colored_root):
    root, ids = colored_root
    dataset = opened(CODED, root)
    for i in range(COUNT):
        assert np.array_equal(dataset[i]["mask"].numpy(), ids[str(i)])
    assert dataset[0]["mask"].dtype == torch.uint8 and errors(CODED, root) == []
    reordered = opened(CODED, root, classes=["cow", "ant", "bee"])  # of a train set
    expected = np.select([ids["0"] == 0, ids["0"] == 1, ids["0"] == 2], [1, 2, 0], 255)
    assert np.array_equal(reordered[0]["mask"].numpy(), expected)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_colours_of_other_modes(colored_root, mode):
    root, ids = colored_root
    with Image.open(root / "maps" / "0.png") as picture:
        picture.convert(mode, palette=Image.Palette.ADAPTIVE).save(root / "maps" / "0.png")
    assert np.array_equal(opened(CODED, root)[0]["mask"].numpy(), ids["0"])


def test_colours_that_are_not_listed_are_named(colored_root):
    root, _ = colored_root
    Image.new("RGB", (WIDTH, HEIGHT), "#010203").save(root / "maps" / "0.png")
    with pytest.raises(BrokenSample, match=rf"1 colours .*: #010203 \({WIDTH * HEIGHT} pixels\); list them there"):
        opened(CODED, root)[0]
    with pytest.raises(BrokenSample, match="is an image of mode RGB.*list them in class_colors"):
        opened(MAPS, root)[0]


def test_one_colour_and_the_ignored_one_is_a_warning(colored_root):
    root, _ = colored_root
    for i in range(COUNT):
        Image.fromarray(COLORS[np.tile([0, 3], (HEIGHT, WIDTH // 2))]).save(root / "maps" / f"{i}.png")
    assert "all other pixels are #090909, which is ignored" in warnings(CODED, root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_colors": ["#000000", "red", "#ff0000"]}, "'red': give a colour as '#rrggbb'"),
        ({"class_colors": [[0, 0, 256], [1, 1, 1], [2, 2, 2]]}, "give a colour"),
        ({"class_colors": [[0, 0, 0], [1, 1, 1]]}, "class_colors has 2 colours for 3 classes"),
        ({"class_colors": ["#000000", [0, 0, 0], "#ff0000"]}, "#000000 is listed more than once"),
        ({"first_id": 1}, "'first_id' is for label maps of ids"),
        ({"class_colors": None}, "ignore_colors without class_colors"),
    ],
)
def test_colours_that_do_not_fit_are_refused(maps_root, options, message):
    with pytest.raises((DataError, ValueError), match=message):
        opened({**CODED, **options}, maps_root)
