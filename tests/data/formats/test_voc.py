"""VocSource."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from allinone_ds.data.check import check_sources
from allinone_ds.errors import BrokenSample, DataError
from tests.data.tiny_sets import HEIGHT, WIDTH, errors, opened, pixels, source, warnings

VOC = {"format": "voc", "path": "VOCdevkit/VOC2012", "split": "train"}
MASKS = {**VOC, "kind": "segmentation", "classes": ["background", "cat", "dog"]}


def object_xml(name: str, box: tuple, difficult: int | None = 0, more: str = "") -> str:
    tags = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object>{more}<name>{name}</name><pose>Left</pose>{flag}<bndbox>{tags}</bndbox></object>"


def write_xml(file: Path, objects: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    file.write_text(f"<annotation><filename>{file.stem}.jpg</filename>{sides}{objects}</annotation>")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images; 0 to 2 are train, 3 and 4 val; label maps of 0, 1 and 3."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    objects = [
        object_xml("dog", (1, 1, WIDTH, HEIGHT)) + object_xml("cat", (5, 6, 14, 15), 1),
        object_xml("person", (2.4, 3, 10.6, 20), None) + object_xml("dog", (3, 3, 8, 8), more=part),
        object_xml("cat", (10, 4, 20, 10)),
        object_xml("dog", (4, 4, 9, 9)),
        object_xml("cat", (4, 4, 9, 9)),
    ]
    for i, text in enumerate(objects):
        Image.fromarray(pixels(i)).save(base / "JPEGImages" / f"2008_{i:06d}.jpg", quality=95)
        write_xml(base / "Annotations" / f"2008_{i:06d}.xml", text)
    for lists, train, val in (("Main", (0, 1, 2), (3, 4)), ("Segmentation", (0, 1), (3,))):
        for name, chosen in (("train", train), ("val", val)):
            (base / "ImageSets" / lists / f"{name}.txt").write_text("".join(f"2008_{i:06d}\n" for i in chosen))
    (base / "ImageSets" / "Main" / "cat_train.txt").write_text("2008_000000  1\n2008_000001 -1\n2008_000002  0\n")
    for i in (0, 1, 3):
        stored = np.array([0, 1, 2, 255], dtype=np.uint8)[np.random.default_rng(i).integers(0, 4, (HEIGHT, WIDTH))]
        mask = Image.fromarray(stored, mode="P")
        mask.putpalette([c for k in range(256) for c in (k * 7 % 256, k * 31 % 256, k * 57 % 256)])
        mask.save(base / "SegmentationClass" / f"2008_{i:06d}.png")
    return tmp_path


def base(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


def test_boxes_equal_those_of_torchvision_as_half_open_intervals(root):
    dataset = opened(VOC, root)
    reference = VOCDetection(str(root), year="2012", image_set="train")
    assert len(dataset) == len(reference) == 3 and dataset.classes == ["cat", "dog", "person"]
    for i in range(3):
        picture, target = reference[i]
        sample = dataset[i]
        assert np.abs(sample["image"].permute(1, 2, 0).numpy().astype(int) - np.array(picture)).max() <= 3  # decoders
        objects = target["annotation"]["object"]
        expected = [
            [float(o["bndbox"]["xmin"]) - 1, float(o["bndbox"]["ymin"]) - 1, float(o["bndbox"]["xmax"]),
             float(o["bndbox"]["ymax"])] for o in objects
        ]  # fmt: skip
        assert np.allclose(sample["boxes"].numpy(), expected)
        assert [dataset.classes[k] for k in sample["labels"]] == [o["name"] for o in objects]
        assert sample["iscrowd"].tolist() == [o.get("difficult") == "1" for o in objects]
    assert check_sources({"it": dataset}, progress=False) == []  # images of other splits are no fault


def test_masks_equal_those_of_torchvision(root):
    dataset = opened(MASKS, root)
    reference = VOCSegmentation(str(root), year="2012", image_set="train")
    assert len(dataset) == len(reference) == 2 and dataset.classes == MASKS["classes"]
    for i in range(2):
        assert np.array_equal(dataset[i]["mask"].numpy(), np.array(reference[i][1]))
        assert Path(dataset.path(i)) == Path(reference.images[i])
    assert 255 in dataset[0]["mask"] and check_sources({"it": dataset}, progress=False) == []
    assert len(opened({**MASKS, "split": "val"}, root, classes=MASKS["classes"])) == 1
    assert len(opened({**MASKS, "split": None}, root)) == 3
    with pytest.raises(DataError, match="set 'classes' of the source or of the task"):
        opened({**MASKS, "classes": None}, root)


def test_masks_in_the_colours_of_their_palette(root):
    """RGB copies of the indexed png files give the same masks."""
    dataset = opened(MASKS, root)
    expected = [dataset[i]["mask"] for i in range(2)]
    for file in (base(root) / "SegmentationClass").iterdir():
        with Image.open(file) as picture:
            picture.convert("RGB").save(file)
    with pytest.raises(BrokenSample, match="is an image of mode RGB.*list them in class_colors"):
        opened(MASKS, root)[0]
    colors = [[k * 7 % 256, k * 31 % 256, k * 57 % 256] for k in (0, 1, 2, 255)]
    coded = {**MASKS, "class_colors": colors[:3], "ignore_colors": colors[3:]}
    assert all(torch.equal(opened(coded, root)[i]["mask"], expected[i]) for i in range(2)) and errors(coded, root) == []
    with pytest.raises(BrokenSample, match="contains 1 colours that are neither in class_colors nor in ignore_colors"):
        opened({**coded, "ignore_colors": []}, root)[0]
    with pytest.raises(ValueError, match="class_colors is an option of kind segmentation"):
        opened({**VOC, "class_colors": colors[:3]}, root)
    merged = {**MASKS, "classes": ["ground", "animal"], "class_ids": [0, [1, 2]]}
    assert opened(merged, root).classes == ["ground", "animal"]


def test_lists_of_one_class_and_no_list(root):
    assert len(opened({**VOC, "split": "cat_train"}, root)) == 3
    assert len(opened({**VOC, "split": None}, root)) == 5
    with pytest.raises(DataError, match="ImageSets/Main/trian.txt: list is missing; did you mean 'train'"):
        opened({**VOC, "split": "trian"}, root)
    with pytest.raises(ValueError, match="give the name of a list"):
        source({**VOC, "split": "Main/train"})


def test_other_folders_and_suffixes(root, tmp_path):
    plain = tmp_path / "plain"
    for i in range(2):
        (plain / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(plain / "images" / "a" / f"im {i}.png")
        write_xml(plain / "annotations" / "a" / f"im {i}.xml", object_xml("cat", (1, 1, 8, 8)), size=(0, 0))
    config = {"format": "voc", "path": "plain", "images": "images", "annotations": "annotations"}
    dataset = opened(config, tmp_path)
    assert len(dataset) == 2 and dataset[1]["boxes"].tolist() == [[0, 0, 8, 8]]
    for i in range(2):  # xml and images in one folder
        (plain / "annotations" / "a" / f"im {i}.xml").rename(plain / "images" / "a" / f"im {i}.xml")
    assert len(opened({**config, "annotations": "images"}, tmp_path)) == 2


def test_classes_follow_those_given_and_those_of_the_train_set(root):
    given = opened({**VOC, "classes": ["person", "dog", "cat", "cow"]}, root)
    assert given.classes == ["person", "dog", "cat", "cow"] and given[0]["labels"].tolist() == [1, 2]
    test = opened({**VOC, "split": "val"}, root, classes=["dog", "cat"])
    assert test.classes == ["dog", "cat"] and [test[i]["labels"].tolist() for i in range(2)] == [[0], [1]]
    with pytest.raises(DataError, match="class 'cat' is not in the train set"):
        opened({**VOC, "split": "val"}, root, classes=["dog"])
    with pytest.raises(DataError, match=r"2008_000001.xml object 1: category_id 'person' is not among 'categories'"):
        opened({**VOC, "classes": ["dog", "cat"]}, root)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (object_xml("", (1, 1, 5, 5)), "object 1: has no <name>"),
        (object_xml("cat", (1, 1, "five", 5)), "object 1: <bndbox> has <xmax> 'five'"),
        ("<object><name>cat</name></object>", "object 1: <bndbox> has <xmin> None"),
        (object_xml("cat", (9, 1, 5, 5)), "object 1: <bndbox> has xmin, ymin, xmax, ymax"),
        (object_xml("cat", (1, 1, WIDTH + 9, 5)), "lies outside its image of 32 x 24"),
        ("<object>", "is not valid XML"),
    ],
)
def test_faults_are_named_with_file_and_object(root, text, reason):
    write_xml(
        base(root) / "Annotations" / "2008_000002.xml", object_xml("cat", (1, 1, 5, 5)) if "outside" in reason else ""
    )
    write_xml(base(root) / "Annotations" / "2008_000002.xml", text)
    [problem] = errors(VOC, root)
    assert "2008_000002" in problem.file and reason in problem.reason
    with pytest.raises(DataError, match="1 problem in the data"):
        opened(VOC, root)


def test_missing_files_and_wrong_sizes(root):
    (base(root) / "Annotations" / "2008_000000.xml").unlink()
    (base(root) / "JPEGImages" / "2008_000001.jpg").unlink()
    write_xml(base(root) / "Annotations" / "2008_000002.xml", object_xml("cat", (1, 1, 5, 5)), size=(WIDTH, HEIGHT))
    assert [(Path(p.file).name, p.reason.split(";")[0].split(",")[0]) for p in errors(VOC, root)] == [
        ("2008_000000.xml", "annotation is missing"),
        ("2008_000001.jpg", "file is missing"),
        ("2008_000002.jpg", "is 32 x 24 (width x height"),
    ]
    (base(root) / "SegmentationClass" / "2008_000001.png").unlink()
    found = errors(MASKS, root)
    assert sorted({Path(p.file).name for p in found}) == ["2008_000001"]
    assert "neither an image nor a label map" in found[0].reason


def test_annotations_without_any_object_are_an_error(root):
    for i in range(3):
        write_xml(base(root) / "Annotations" / f"2008_{i:06d}.xml", "")
    with pytest.raises(DataError, match="the annotations contain no object"):
        opened(VOC, root)
    write_xml(base(root) / "Annotations" / "2008_000000.xml", object_xml("cat", (1, 1, 5, 5)))
    dataset = opened(VOC, root)  # images without an object stay
    assert [len(dataset[i]["boxes"]) for i in range(3)] == [1, 0, 0] and "no box" not in warnings(VOC, root)
