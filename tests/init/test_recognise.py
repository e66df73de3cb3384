"""What is recognised in folders that are less tidy, and what is said about data that is not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from allinone_ds.data.combination import combine
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import DataError
from allinone_ds.init.recognise import recognise
from tests.init.layouts import (
    coco_official,
    coco_one_json,
    folders_plain,
    folders_split,
    lists,
    maps_binary,
    maps_cityscapes,
    maps_two_folders,
    picture,
    table,
    voc_kaggle,
    voc_official,
    write_coco,
    write_maps,
    write_pictures,
    yolo_roboflow,
    yolo_without_yaml,
)


def only(root: Path):
    [task] = recognise(root).values()
    return task


def test_class_folders_may_lie_deeper(tmp_path: Path) -> None:
    for j, name in enumerate(("pie", "soup")):  # Food-101
        write_pictures(tmp_path / "food" / "images" / name, 3, 10 * j)
    (tmp_path / "food" / "meta").mkdir()
    (tmp_path / "food" / "meta" / "train.txt").write_text("pie/p0\n")
    assert only(tmp_path / "food").train == {"format": "class_folders", "images": "images"}
    folders_split(tmp_path / "zip" / "inner" / "deeper")
    (tmp_path / "zip" / "__MACOSX").mkdir()
    (tmp_path / "zip" / "README.md").touch()
    task = only(tmp_path / "zip")
    assert (task.train["images"], task.test["images"]) == ("inner/deeper/train", "inner/deeper/val")


def test_a_part_without_classes_is_left_out_and_named(tmp_path: Path) -> None:
    for j, name in enumerate(("n01440764", "n01443537")):
        write_pictures(tmp_path / "train" / name, 3, 10 * j, ".JPEG")
    write_pictures(tmp_path / "val", 4, 70, ".JPEG")
    task = only(tmp_path)
    assert task.train["images"] == "train" and task.test is None
    assert task.notes == ["val has no folder per class and is not used"]


def test_folders_called_train_beside_other_classes_are_classes(tmp_path: Path) -> None:
    for j, name in enumerate(("bus", "car", "train")):
        write_pictures(tmp_path / name, 3, 10 * j)
    task = only(tmp_path)
    assert task.train == {"format": "class_folders", "images": "."} and "train count as classes" in task.notes[0]


def test_a_table_of_a_competition(tmp_path: Path) -> None:
    train, test = write_pictures(tmp_path / "train", 6), write_pictures(tmp_path / "test", 4, 90)
    (tmp_path / "train.csv").write_text("id;label\n" + "".join(f"{n};{i % 2}\n" for i, n in enumerate(train)))
    (tmp_path / "sample_submission.csv").write_text("id;label\n" + "".join(f"{n};0\n" for n in test))
    task = only(tmp_path)
    assert task.train["table"] == "train.csv" and task.train["delimiter"] == ";" and task.test is None
    assert any("sample_submission.csv lists images, but no column" in note for note in task.notes)


def test_boxes_and_classes_of_tables(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "boxes" / "images", 4)
    rows = [f"{name},{kind},1,1,5,5" for name in names for kind in "ab"]
    (tmp_path / "boxes" / "table.csv").write_text("\n".join(["filename,class,xmin,ymin,xmax,ymax", *rows]))
    assert only(tmp_path / "boxes").train == {
        "format": "box_table",
        "images": "images",
        "table": "table.csv",
        "image_column": "filename",
        "label_column": "class",
        "box_columns": ["xmin", "ymin", "xmax", "ymax"],
        "boxes": "xyxy",
        "fractions": False,
    }
    names = write_pictures(tmp_path / "skin" / "images", 6)
    rows = [f"{name},{float(i % 3 == 0)},1.0,{float(i % 3 == 2)}" for i, name in enumerate(names)]
    (tmp_path / "skin" / "table.csv").write_text("\n".join(["image,MEL,NV,BCC", *rows]))
    task = only(tmp_path / "skin")  # several labels per image
    assert (task.kind, task.train["columns"]) == ("attributes", ["MEL", "NV", "BCC"])
    assert "3 columns are taken for attributes; 0 is one that an image does not have" in task.notes[0]


@pytest.mark.parametrize(
    ("header", "row", "kind", "fractions"),
    [
        ("file,label,x,y,w,h", "a,60,40,20,20", "xywh", False),
        ("file,label,Left,Top,Width,Height", "a,60,40,20,20", "xywh", False),
        ("file,label,x_center,y_center,width,height", "a,0.5,0.5,0.2,0.2", "cxcywh", True),
        ("file,label,bbox_x1,bbox_y1,bbox_x2,bbox_y2", "a,60,40,80,60", "xyxy", False),
        ("file,label,bbox", 'a,"[60, 40, 80, 60]"', "xyxy", False),  # beyond the image as a size
        ("file,label,bbox", 'a,"60 40 20 20"', "xywh", False),
        ("file,label,x1,y1,x2,y2", "a,60,40,20,20", "xywh", False),  # sizes that are called corners
    ],
)
def test_headers_of_boxes(tmp_path: Path, header: str, row: str, kind: str, fractions: bool) -> None:
    names = write_pictures(tmp_path / "images", 4)
    (tmp_path / "boxes.csv").write_text("\n".join([header, *(f"{name},{row}" for name in names)]))
    task = only(tmp_path)
    assert (task.train["boxes"], task.train["fractions"], task.train["label_column"]) == (kind, fractions, "label")
    dataset = open_source(TypeAdapter(Source).validate_python(task.train), tmp_path)
    expected = [32.0, 24.0, 48.0, 36.0] if fractions else [60.0, 40.0, 80.0, 60.0]
    assert dataset[0]["boxes"].tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"image,label\n", "t.csv: it has no row below the header"),
        (b"image,label\nC:\\d\\p0.png,a\n", r"t.csv: names C:\d\p0.png, which is not here"),
        (b"image,label\np9,a\n", "t.csv: no column of it names images that are here"),
        (b"image,label\np0.png,caf\xe9\n", "t.csv: cannot be read as text: .*save it as UTF-8"),
        (b"image,a\np0.png,1\np1.png,1\n", "no column of it looks like classes, attributes or numbers"),
    ],
)
def test_a_table_that_is_not_read_is_named(tmp_path: Path, text: bytes, says: str) -> None:
    write_pictures(tmp_path / "images", 2)
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(DataError, match=says.replace("C:\\d\\", r"C:\\d\\")):
        recognise(tmp_path)


def test_ids_that_a_spreadsheet_wrote_are_classes(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 6)
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f"{n},{i % 3}.0\n" for i, n in enumerate(names)))
    assert only(tmp_path).train["label_column"] == "label"


def test_a_coco_json_without_boxes_is_named(tmp_path: Path) -> None:
    coco_one_json(tmp_path)
    text = (tmp_path / "labels.json").read_text().replace('"bbox"', '"segmentation"')
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DataError, match="labels.json is a COCO json, but none of its 12 annotations has a bbox"):
        recognise(tmp_path)


def test_coloured_masks_and_lists_of_names_are_named(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a" / "images", 4)
    write_pictures(tmp_path / "a" / "masks", 4)
    with pytest.raises(DataError, match=r"masks may hold label maps, but p0.png has \d+ colours"):
        recognise(tmp_path / "a")
    names = write_pictures(tmp_path / "b" / "images", 4)
    (tmp_path / "b" / "train.txt").write_text("".join(f"images/{name} cat\n" for name in names))
    with pytest.raises(DataError, match="train.txt lists images with class names"):
        recognise(tmp_path / "b")


def test_grey_pictures_are_not_label_maps(tmp_path: Path) -> None:
    images = tmp_path / "segmentation" / "images"
    images.mkdir(parents=True)
    for i in range(4):
        picture(i).convert("L").save(images / f"{i}.png")
        if i:
            Image.new("L", (80, 60), 7).save(images / f"{i}.png")  # of one value
    write_maps(tmp_path / "segmentation" / "masks", [f"{i}.png" for i in range(4)], (0, 255), "_mask")
    assert only(tmp_path).train == {
        "format": "label_maps",
        "images": "segmentation/images",
        "label_maps": "segmentation/masks",
        "label_map_suffix": "_mask",
        "class_ids": [0, 255],
    }


@pytest.mark.parametrize(
    ("values", "options", "classes"),
    [
        ((0, 1, 2), {}, ["class_0", "class_1", "class_2"]),
        ((0, 3, 255), {}, ["class_0", "class_1", "class_2", "class_3"]),
        ((0, 128), {"class_ids": [0, 128]}, ["class_0", "class_128"]),
        ((0, 100, 255), {"class_ids": [0, 100]}, ["class_0", "class_100"]),
        ((1, 2, 3), {"first_id": 1}, ["class_1", "class_2", "class_3"]),
        ((5,), {"first_id": 5}, ["class_5"]),
    ],
)
def test_ids_of_label_maps(tmp_path: Path, values: tuple, options: dict, classes: list) -> None:
    write_maps(tmp_path / "masks", write_pictures(tmp_path / "images", 4), values)
    task = only(tmp_path)
    assert task.train == {"format": "label_maps", "images": "images", "label_maps": "masks", **options}
    assert task.classes == classes
    assert any("255" in note for note in task.notes) == (255 in values)


def test_boxes_and_masks_of_the_same_images_are_two_tasks(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 5, suffix=".jpg")
    write_coco(tmp_path / "boxes.json", names)
    write_maps(tmp_path / "masks", names)
    found = recognise(tmp_path)
    assert {name.rpartition("_")[2]: task.kind for name, task in found.items()} == {
        "detection": "detection",
        "segmentation": "segmentation",
    }


def test_a_folder_of_data_sets_gives_one_task_each(tmp_path: Path) -> None:
    writers = {"a": folders_plain, "b": maps_cityscapes, "c": coco_official, "d": yolo_roboflow, "e": voc_official}
    for name, write in {**writers, "f": maps_binary}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    found = recognise(tmp_path)
    assert [task.kind[:3] for task in found.values()] == ["cla", "seg", "det", "det", "det", "seg"]
    assert list(found) == ["a", "b", "c", "d", "e", "f"]
    assert found["d"].train["data"] == "d/data.yaml" and found["b"].train["images"] == "b/leftImg8bit/train"
    assert "nothing was recognised in notes" in found["a"].notes


@pytest.mark.parametrize(
    "write", [maps_two_folders, yolo_without_yaml, coco_one_json, voc_kaggle, table, lists, folders_split]
)
def test_two_data_sets_of_one_layout_are_not_mixed(tmp_path: Path, write) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    found = recognise(tmp_path)
    assert list(found) == ["a", "b"]
    for name, task in found.items():
        keys = ("path",) if "path" in task.train else ("images", "annotations", "label_maps", "list", "table")
        places = [task.train[key] for key in keys if key in task.train]
        assert places and all(Path(place).parts[0] == name for place in places)


def test_label_maps_below_their_images_are_named(tmp_path: Path) -> None:
    write_maps(tmp_path / "masks", write_pictures(tmp_path, 4, suffix=".jpg"))
    with pytest.raises(DataError, match=r"label maps and images lie inside each other \(., masks\)"):
        recognise(tmp_path)


def test_boxes_of_a_saved_dataset_are_read_in_the_format_that_fits(tmp_path: Path) -> None:
    import datasets

    names = write_pictures(tmp_path / "pictures", 4)
    number = datasets.Value("float32")
    inside = {"bbox": datasets.List(number), "category_id": datasets.Value("int64")}
    features = datasets.Features({"img": datasets.Image(), "annotations": datasets.List(inside)})
    boxes = {"pascal": [40.0, 30.0, 70.0, 55.0], "coco": [40.0, 30.0, 20.0, 25.0]}
    for bbox_format, box in boxes.items():
        cells = [[{"bbox": box, "category_id": i % 3}] for i in range(4)]
        content = {"img": [str(tmp_path / "pictures" / name) for name in names], "annotations": cells}
        datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / bbox_format))
        task = only(tmp_path / bbox_format)
        assert task.train.get("bbox_format", "coco") == bbox_format and task.classes == [
            "class_0",
            "class_1",
            "class_2",
        ]
        assert task.train["columns"] == {"image": "img", "objects": "annotations", "category": "category_id"}


@pytest.mark.parametrize(
    ("values", "options", "classes"),
    [((0, 1), {}, ["class_0", "class_1"]), ((0, 255), {"class_ids": [0, 255]}, ["background", "foreground"])],
)
def test_label_maps_of_a_saved_dataset(tmp_path: Path, values: tuple, options: dict, classes: list) -> None:
    import datasets

    names = write_pictures(tmp_path / "images", 3)
    write_maps(tmp_path / "maps", names, values)
    content = {
        "image": [str(tmp_path / "images" / n) for n in names],
        "mask": [str(tmp_path / "maps" / n) for n in names],
    }
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "saved"))
    task = only(tmp_path / "saved")
    assert {key: task.train[key] for key in options} == options and task.classes == classes
    dataset = open_source(combine(TypeAdapter(Source).validate_python(task.train), classes), tmp_path / "saved")
    assert set(dataset[0]["mask"].unique().tolist()) == {0, 1}


def test_a_link_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    folders_plain(tmp_path / "pets")
    (tmp_path / "pets" / "PetImages" / "Cat" / "again").symlink_to(tmp_path / "pets", target_is_directory=True)
    assert only(tmp_path / "pets").train["images"] == "PetImages"
