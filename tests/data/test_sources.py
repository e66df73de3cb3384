import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from tiny_sets import CLASSES, COUNT, HEIGHT, WIDTH, coco_content, pixels, write_images
from torchvision import tv_tensors

from allinone_ds.data.check import check_sources
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import BrokenSample, DataError

COCO = {"format": "coco", "images": "images", "annotations": "boxes.json"}
MAPS = {"format": "label_maps", "images": "images", "label_maps": "maps", "classes": CLASSES}
LIST = {"format": "image_list", "images": "images", "list": "list.txt", "classes": CLASSES}
FOLDERS = {"format": "class_folders", "images": "images"}


def source(config: dict):
    return TypeAdapter(Source).validate_python(config)


def opened(config: dict, root: Path, **options):
    return open_source(source(config), root, **options)


def errors(config: dict, root: Path) -> list:
    return [p for p in check_sources({"it": source(config)}, root, progress=False) if p.level == "error"]


def warned(config: dict, root: Path) -> str:
    found = check_sources({"it": source(config)}, root, progress=False)
    return "\n".join(str(p) for p in found if p.level == "warning")


# ---- what a good set gives


@pytest.mark.parametrize(
    ("config", "fixture", "kind"),
    [
        (COCO, "coco_root", "detection"),
        (MAPS, "maps_root", "segmentation"),
        (LIST, "list_root", "classification"),
        (FOLDERS, "folders_root", "classification"),
    ],
)
def test_samples_are_as_the_contract_says(config, fixture, kind, request):
    dataset = opened(config, request.getfixturevalue(fixture))
    assert dataset.kind == kind and dataset.classes == CLASSES
    assert len(dataset) == (6 if config is FOLDERS else COUNT)
    for i in range(len(dataset)):
        sample = dataset[i]
        assert type(sample["image"]) is tv_tensors.Image and sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (3, HEIGHT, WIDTH)
        assert sample["index"] == i and sample["path"] == dataset.path(i) and Path(sample["path"]).is_file()
        stored = np.array(Image.open(sample["path"]))
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), stored)
    assert list(dataset.problems()) == [None] * len(dataset)
    assert check_sources({"it": dataset}, progress=False) == [] or config is FOLDERS  # equal files in two folders


def test_coco_boxes_labels_and_crowds(coco_root):
    content = coco_content()
    content["annotations"] += [
        {"id": 50, "image_id": 102, "category_id": 7, "bbox": [1.5, 2.5, 10, 4.25], "iscrowd": 1},
        {"id": 51, "image_id": 102, "category_id": 7, "bbox": [5, 5, 0, 3], "iscrowd": 0},  # no area
        {"id": 52, "image_id": 102, "category_id": 7, "bbox": [-0.5, 0, 33, 24.4], "iscrowd": 0},  # rounding
    ]
    content["annotations"].reverse()  # the order of annotations does not matter
    content["images"].append({"id": 1, "file_name": "empty.png", "width": WIDTH, "height": HEIGHT})
    Image.fromarray(pixels(99)).save(coco_root / "images" / "empty.png")
    (coco_root / "boxes.json").write_text(json.dumps(content))
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
    assert "has no area" in warned(COCO, coco_root)


def test_a_train_set_s_categories_without_a_box_are_told(coco_root):
    content = coco_content()
    content["categories"] += [{"id": 91 + i, "name": name} for i, name in enumerate(("dog", "eel"))]
    (coco_root / "boxes.json").write_text(json.dumps(content))
    assert "boxes.json: no box has category dog, eel (2 of 5)" in warned(COCO, coco_root)
    assert opened(COCO, coco_root, classes=[*CLASSES, "dog", "eel"]).structural == []  # a test set may lack some


def test_coco_without_sizes_reads_them_from_the_files(coco_root):
    content = coco_content()
    for record in content["images"]:
        del record["width"], record["height"]
    (coco_root / "boxes.json").write_text(json.dumps(content))
    assert opened(COCO, coco_root).sizes == [(HEIGHT, WIDTH)] * COUNT
    content["annotations"][0]["bbox"] = [0, 0, 100, 5]
    (coco_root / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="outside its image of 32 x 24"):
        opened(COCO, coco_root)


def test_masks_keep_class_ids_and_255(maps_root):
    dataset = opened(MAPS, maps_root)
    for i in range(COUNT):
        mask = dataset[i]["mask"]
        assert type(mask) is tv_tensors.Mask and mask.dtype == torch.uint8
        assert np.array_equal(mask.numpy(), np.array(Image.open(maps_root / "maps" / f"{i}.png")))


def test_another_ignore_index_becomes_255(maps_root):
    for file in (maps_root / "maps").iterdir():
        stored = np.array(Image.open(file)).astype(np.uint16)
        Image.fromarray(np.where(stored == 255, 1000, stored).astype(np.uint16)).save(file)
    dataset = opened({**MAPS, "ignore_index": 1000}, maps_root)
    assert set(np.unique(dataset[0]["mask"])) == {0, 1, 2, 255}


def test_ids_from_1_on_with_0_for_no_class_as_in_ade20k(maps_root):
    expected = opened(MAPS, maps_root)[0]["mask"]
    for file in (maps_root / "maps").iterdir():
        stored = np.array(Image.open(file))
        Image.fromarray((stored + 1).astype(np.uint8)).save(file)  # 255 becomes 0
    dataset = opened({**MAPS, "ignore_index": 0, "first_id": 1}, maps_root)
    assert torch.equal(dataset[0]["mask"], expected) and set(expected.unique().tolist()) == {0, 1, 2, 255}
    with pytest.raises(DataError, match="3 classes from id 1 on, with ignore_index 3"):
        opened({**MAPS, "ignore_index": 3, "first_id": 1}, maps_root)
    assert "allowed are 1..2 and 0" in opened({**MAPS, "ignore_index": 0, "first_id": 1, "classes": CLASSES[:2]},
                                              maps_root).check(0)[0].reason  # fmt: skip


def test_images_and_maps_with_suffixes_of_their_own_as_in_cityscapes(maps_root):
    for kind, end in (("images", "_leftImg8bit"), ("maps", "_gtFine_labelTrainIds")):
        for file in list((maps_root / kind).iterdir()):
            folder = maps_root / kind / "aachen"
            folder.mkdir(exist_ok=True)
            file.rename(folder / f"{file.stem}{end}{file.suffix}")
    (maps_root / "maps" / "aachen" / "0_gtFine_color.png").write_bytes(b"another kind of map")
    suffixes = {"image_suffix": "_leftImg8bit", "label_map_suffix": "_gtFine_labelTrainIds"}
    dataset = opened({**MAPS, **suffixes}, maps_root)
    assert len(dataset) == COUNT and dataset.path(0).endswith("aachen/0_leftImg8bit.png")
    assert [problem.level for problem in dataset.structural] == ["warning"]  # the color map, not used
    with pytest.raises(DataError, match="has no label map .*0_leftImg8bit_gtFine_labelTrainIds.png"):
        opened({**MAPS, "label_map_suffix": "_gtFine_labelTrainIds"}, maps_root)


def test_lists_take_spaces_comments_and_class_files(list_root):
    (list_root / "images" / "0.png").rename(list_root / "images" / "a b.png")
    lines = (list_root / "list.txt").read_text().replace("0.png", "a b.png")
    (list_root / "list.txt").write_text("# file class\n\n" + lines)
    (list_root / "names.txt").write_text("\n".join(CLASSES) + "\n")
    dataset = opened({**LIST, "classes": "names.txt"}, list_root)
    assert [dataset[i]["label"] for i in range(COUNT)] == [i % 3 for i in range(COUNT)]
    assert dataset.classes == CLASSES and dataset.path(0).endswith("a b.png")
    assert opened({k: v for k, v in LIST.items() if k != "classes"}, list_root).classes == ["0", "1", "2"]


def test_class_folders_are_numbered_by_name(folders_root):
    (folders_root / "images" / "bee" / "deeper").mkdir()
    Image.fromarray(pixels(9)).save(folders_root / "images" / "bee" / "deeper" / "x.jpg")
    (folders_root / "images" / "bee" / ".ipynb_checkpoints").mkdir()  # what an editor keeps: a copy
    Image.fromarray(pixels(9)).save(folders_root / "images" / "bee" / ".ipynb_checkpoints" / "x-checkpoint.jpg")
    dataset = opened(FOLDERS, folders_root)
    assert len(dataset) == 7
    assert [Path(dataset.path(i)).relative_to(folders_root / "images").parts[0] for i in range(7)] == [
        CLASSES[dataset[i]["label"]] for i in range(7)
    ]


# ---- a test set takes the places of its train set


def test_test_sets_take_their_train_sets_places_by_name(coco_root, folders_root):
    wanted = ["dog", "cow", "bee", "ant"]
    coco = opened(COCO, coco_root, classes=wanted)
    assert coco.classes == wanted and coco.category_ids == [None, 90, 20, 7]
    assert [coco[i]["labels"].item() for i in range(3)] == [3, 2, 1]


def test_a_test_set_may_lack_classes_but_not_add_any(folders_root):
    for name in ("ant", "bee"):
        for file in (folders_root / "images" / name).iterdir():
            file.unlink()
        (folders_root / "images" / name).rmdir()
    dataset = opened(FOLDERS, folders_root, classes=CLASSES)
    assert {dataset[i]["label"] for i in range(len(dataset))} == {2} and dataset.classes == CLASSES
    with pytest.raises(DataError, match="class 'cow' is not in the train set.*allowed: ant, crow"):
        opened(FOLDERS, folders_root, classes=["ant", "crow"])


def test_masks_and_lists_follow_the_train_sets_order(maps_root):
    dataset = opened(MAPS, maps_root, classes=CLASSES[::-1])
    stored = np.array(Image.open(maps_root / "maps" / "0.png"))
    assert np.array_equal(dataset[0]["mask"].numpy(), np.array([2, 1, 0] + [0] * 252 + [255])[stored])
    (maps_root / "list.txt").write_text("0.png 0\n1.png 2\n")
    listed = opened(LIST, maps_root, classes=CLASSES[::-1])
    assert [listed[i]["label"] for i in range(2)] == [2, 0]


# ---- faults: raised before training, all told by a check


def edit_coco(root: Path, change) -> None:
    content = coco_content()
    change(content)
    (root / "boxes.json").write_text(json.dumps(content))


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
    "image record": (lambda c: c["images"][1].pop("file_name"), "needs 'id' and 'file_name'"),
    "empty": (lambda c: c.update(images=[], annotations=[]), "there is no sample in it"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_faults_in_coco_are_raised_at_once_and_told_by_the_check(coco_root, fault):
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
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category id 1 is used twice",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "class names stand there twice: a",
        ),
    ],
)
def test_a_json_that_is_no_coco_is_refused(coco_root, text, message):
    (coco_root / "boxes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(COCO, coco_root)
    assert any(re.search(message, str(p)) for p in errors(COCO, coco_root))


def test_all_faults_are_listed_at_once(coco_root):
    edit_coco(coco_root, lambda c: [a.update(bbox=[0, 0, 99, 5]) for a in c["annotations"]])
    with pytest.raises(DataError, match=f"{COUNT} problems in the data") as caught:
        opened(COCO, coco_root)
    assert len(caught.value.problems) == COUNT


def test_a_long_list_of_faults_is_cut(list_root):
    (list_root / "list.txt").write_text("".join(f"gone{i}.png 0\n" for i in range(50)))
    with pytest.raises(
        DataError, match="(?s)50 problems.*gone0.*gone9.*40 more; `allinone-ds check CONFIG` lists all"
    ) as caught:
        opened(LIST, list_root)
    assert len(caught.value.problems) == 50 and str(caught.value).count("gone") == 10


def test_an_image_of_another_size_than_its_json_says_is_broken(coco_root):
    edit_coco(coco_root, lambda c: c["images"][1].update(width=WIDTH + 9))
    dataset = opened(COCO, coco_root)
    with pytest.raises(BrokenSample, match=r"1\.png: is 32 x 24 .*boxes\.json says 41 x 24"):
        dataset[1]
    assert len(errors(COCO, coco_root)) == 1


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_broken_file_is_found_by_the_check_and_by_reading(list_root, suffix):
    write_images(list_root / "images", suffix=suffix)
    (list_root / "list.txt").write_text("".join(f"{i}{suffix} 0\n" for i in range(COUNT)))
    file = list_root / "images" / f"3{suffix}"
    file.write_bytes(file.read_bytes()[:-300])
    dataset = opened(LIST, list_root)  # opening does not decode
    with pytest.raises(BrokenSample, match=f"3{suffix}: cannot be decoded"):
        dataset[3]
    assert [Path(p.file).name for p in errors(LIST, list_root)] == [f"3{suffix}"]
    assert [Path(p.file).name for p in dataset.problems() if p and p.level == "error"] == [f"3{suffix}"]


def test_label_maps_of_another_size_or_with_unknown_ids_are_broken(maps_root):
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8)).save(maps_root / "maps" / "2.png")
    stored = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    stored[:2, :3] = 3
    Image.fromarray(stored).save(maps_root / "maps" / "4.png")
    dataset = opened(MAPS, maps_root)
    with pytest.raises(BrokenSample, match=r"maps/2\.png: is 33 x 24 .*, its image 32 x 24"):
        dataset[2]
    with pytest.raises(BrokenSample, match=r"maps/4\.png: holds 3 in 6 pixels; allowed are 0\.\.2 and 255"):
        dataset[4]
    assert [Path(p.file).name for p in errors(MAPS, maps_root)] == ["2.png", "4.png"]


def test_images_and_maps_without_partner_are_errors(maps_root):
    (maps_root / "maps" / "2.png").unlink()
    (maps_root / "images" / "4.png").unlink()
    with pytest.raises(DataError, match=r"(?s)images/2\.png: has no label map.*maps/4\.png: has no image"):
        opened(MAPS, maps_root)
    assert len(errors(MAPS, maps_root)) == 2


def test_two_images_of_one_stem_are_an_error(maps_root):
    Image.fromarray(pixels(0)).save(maps_root / "images" / "0.jpg")
    with pytest.raises(DataError, match=r"0\.jpg: there is also 0\.png"):
        opened(MAPS, maps_root)


@pytest.mark.parametrize("options", [{"classes": []}, {"ignore_index": 2}, {"classes": [str(i) for i in range(256)]}])
def test_impossible_classes_of_label_maps_are_refused(maps_root, options):
    with pytest.raises(DataError, match="give 1 to 255 classes, and an ignore_index"):
        opened({**MAPS, **options}, maps_root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0.png 3", r"line 1: class id 3 must lie in 0\.\.2 \(ids count from first_id, which is 0\)"),
        ("0.png -1", "class id -1 must lie in"),
        ("0.png", "line 1: '0.png' must be `file class-id`"),
        ("0.png ant", "must be `file class-id`"),
        ("0.png ²", "must be `file class-id`"),
        ("0.png --1", "must be `file class-id`"),
        ("gone.png 0", r"gone\.png: file is missing"),
        ("# nothing", "there is no sample in it"),
    ],
)
def test_faults_in_lists(list_root, line, message):
    (list_root / "list.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        opened(LIST, list_root)
    assert errors(LIST, list_root)


def test_empty_folders_are_errors(folders_root):
    (folders_root / "images" / "dog").mkdir()
    with pytest.raises(DataError, match="dog: class folder without an image"):
        opened(FOLDERS, folders_root)
    (folders_root / "none").mkdir()
    with pytest.raises(DataError, match="none: there is no class folder"):
        opened({**FOLDERS, "images": "none"}, folders_root)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COCO, "annotations": "no.json"}, r"no\.json: file is missing"),
        ({**COCO, "images": "no"}, "no: 'images' must be a folder, there is none"),
        ({**COCO, "images": "boxes.json"}, "'images' must be a folder, it is a file"),
        ({**MAPS, "label_maps": "no"}, "'label_maps' must be a folder"),
        ({**LIST, "list": "no.txt"}, r"no\.txt: file is missing"),
        ({**LIST, "list": "boxes.json", "classes": "no.txt"}, r"no\.txt: file is missing"),
        ({**FOLDERS, "images": "no"}, "'images' must be a folder"),
    ],
)
def test_wrong_paths_are_named_with_their_field(coco_root, config, message):
    with pytest.raises(DataError, match=message):
        opened(config, coco_root)
    assert len(errors(config, coco_root)) == 1


# ---- warnings


def test_orphans_duplicates_and_off_by_one_ids_are_warnings(list_root):
    Image.fromarray(pixels(50)).save(list_root / "images" / "left.png")
    (list_root / "images" / "5.png").write_bytes((list_root / "images" / "4.png").read_bytes())
    (list_root / "list.txt").write_text("".join(f"{i}.png {i % 3 + 1}\n" for i in range(COUNT)) + "0.png 1\n")
    config = {k: v for k, v in LIST.items() if k != "classes"}
    assert len(opened(config, list_root)) == COUNT + 1  # warnings do not stop a run
    told = warned(config, list_root)
    assert "not used: 1 (left.png)" in told
    assert "5.png: has the same content as" in told
    assert "0.png: is listed more than once" in told
    assert "no image has class id 0" in told
    assert errors(config, list_root) == []


# ---- the config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COCO, "format": "cocoo"}, "format is 'cocoo'; did you mean 'coco'"),
        ({k: v for k, v in COCO.items() if k != "format"}, "format is None"),
        ({**COCO, "annotation": "x"}, "annotation"),
        ({k: v for k, v in COCO.items() if k != "images"}, "images"),
    ],
)
def test_sources_are_read_strictly(config, message):
    with pytest.raises(ValidationError, match=message):
        source(config)


# ---- the check


def test_the_check_goes_on_after_a_source_that_cannot_be_opened(coco_root):
    (coco_root / "images" / "6.png").write_bytes(b"no picture")
    sources = {"first": source({**COCO, "annotations": "no.json"}), "second": source(COCO)}
    found = check_sources(sources, coco_root, progress=False)
    assert [Path(p.file).name for p in found] == ["first", "6.png"]


def test_the_check_compares_the_classes_of_train_and_test(folders_root):
    write_images(folders_root / "test" / "cat", 1)
    sources = {"train": source(FOLDERS), "test": source({**FOLDERS, "images": "test"})}
    assert [p for p in check_sources(sources, folders_root, progress=False) if p.level == "error"] == []
    [found] = [
        p
        for p in check_sources(sources, folders_root, progress=False, classes_of={"test": "train"})
        if p.level == "error"
    ]
    assert found.file == "test" and "class 'cat' is not in the train set" in found.reason


def test_the_check_tells_a_missing_file_once(coco_root):
    (coco_root / "images" / "6.png").unlink()
    assert len(errors(COCO, coco_root)) == 1


def test_the_check_draws_its_bar_on_stderr(coco_root, capsys):
    check_sources({"boxes of mine": source(COCO)}, coco_root, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "boxes of mine" in err and f"{COUNT}/{COUNT}" in err
