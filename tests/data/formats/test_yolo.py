"""YoloSource."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allinone_ds.data.check import check_sources
from allinone_ds.data.combination import combine
from allinone_ds.data.formats.yolo import label_path
from allinone_ds.data.sources import open_source
from allinone_ds.errors import DataError
from tests.data.tiny_sets import HEIGHT, WIDTH, errors, opened, pixels, source, warnings

NAMES = ["ant", "bee", "cow"]
YOLO = {"format": "yolo", "data": "data.yaml"}


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)


def labels(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """images/{train,val}/*.png with labels beside; train has a box, an outline, no object and no label file."""
    for i in range(4):
        image(tmp_path / "images" / "train" / f"{i}.png", i)
    image(tmp_path / "images" / "val" / "9.png", 9)
    labels(tmp_path / "labels" / "train" / "0.txt", "2 0.5 0.5 0.25 0.5", "0 0.25 0.25 0.25 0.25")
    labels(tmp_path / "labels" / "train" / "1.txt", "1 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.75")
    labels(tmp_path / "labels" / "train" / "2.txt", "")
    labels(tmp_path / "labels" / "val" / "9.txt", "0 0.5 0.5 1 1")
    write_yaml(tmp_path)
    return tmp_path


def write_yaml(root: Path, **keys) -> None:
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES)), **keys}
    (root / "data.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))


def boxes(dataset) -> list[list[list[float]]]:
    return [dataset[i]["boxes"].tolist() for i in range(len(dataset))]


def test_boxes_and_outlines_become_boxes_in_pixels(root):
    dataset = opened(YOLO, root)
    assert dataset.classes == NAMES and len(dataset) == 4
    assert boxes(dataset) == [[[12, 6, 20, 18], [4, 3, 12, 9]], [[8, 6, 24, 18]], [], []]
    assert [dataset[i]["labels"].tolist() for i in range(4)] == [[2, 0], [1], [], []]
    sample = dataset[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels(0))
    assert sample["path"] == str(root / "images/train/0.png") and not sample["iscrowd"].any()
    assert "1 of 4 images have no label file and count as images without objects" in warnings(YOLO, root)
    assert errors(YOLO, root) == []


def reference(lines: list[str], size: tuple[int, int]) -> np.ndarray:
    """(n, 5) class and XYXY pixels, by the steps of ultralytics: segments2boxes, xywh2xyxy, denormalize, clip."""
    rows = [line.split() for line in lines]
    if any(len(row) > 6 for row in rows):
        parsed = []
        for row in rows:
            x, y = np.array(row[1:], dtype=np.float64).reshape(-1, 2).T
            x1, y1, x2, y2 = x.min(), y.min(), x.max(), y.max()
            parsed.append([float(row[0]), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    else:
        parsed = [[float(word) for word in row] for row in rows]
    out = np.array(list(dict.fromkeys(map(tuple, parsed))))
    xywh = out[:, 1:] * [size[1], size[0], size[1], size[0]]
    xyxy = np.concatenate([xywh[:, :2] - xywh[:, 2:] / 2, xywh[:, :2] + xywh[:, 2:] / 2], axis=1)
    return np.column_stack([out[:, 0], xyxy.clip(0, [size[1], size[0], size[1], size[0]])])


@pytest.mark.parametrize("outlines", [False, True])
def test_random_labels_equal_the_reference(root, outlines):
    rng = np.random.default_rng(5)
    for i in range(4):
        lines = []
        for _ in range(6):
            points = rng.uniform(0, 1, (5, 2))
            if outlines:
                row = points.ravel()
            else:
                low, high = points.min(0), points.max(0)
                row = np.concatenate([(low + high) / 2, high - low])
            lines.append(f"{rng.integers(3)} " + " ".join(f"{v:.6f}" for v in row))
        lines.append(lines[0])  # a repeated line counts once
        labels(root / "labels" / "train" / f"{i}.txt", *lines)
        expected = reference(lines, (HEIGHT, WIDTH))
        sample = opened(YOLO, root)[i]
        assert np.allclose(sample["boxes"].numpy(), expected[:, 1:], atol=1e-3)
        assert sample["labels"].tolist() == expected[:, 0].tolist()
    assert "repeats an object; it is used once" in warnings(YOLO, root)


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"train": "images/train"}, 4),
        ({"train": ["images/train", "images/val"]}, 5),
        ({"train": "list.txt"}, 2),
        ({"train": "../images/train"}, 4),  # written for a folder deeper
        ({"path": None}, 4),
        ({"path": "/nowhere/datasets/signs"}, 4),
        ({"path": "images", "train": "train"}, 4),
        ({"names": NAMES, "nc": 3}, 4),
    ],
)
def test_a_split_is_a_folder_several_or_a_list(root, keys, count):
    (root / "list.txt").write_text("./images/train/0.png\nimages/train/1.png\n\n")
    write_yaml(root, **keys)
    assert len(opened(YOLO, root)) == count


def test_absolute_paths_and_other_splits(root):
    write_yaml(root, path=str(root), train=str(root / "images" / "train"), val=None, validation="images/val")
    assert len(opened(YOLO, root)) == 4 and boxes(opened({**YOLO, "split": "val"}, root)) == [[[0, 0, WIDTH, HEIGHT]]]
    (root / "all.txt").write_text(str(root / "images/train/0.png"))
    write_yaml(root, train="all.txt")
    assert len(opened(YOLO, root)) == 1


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/a/images/train/1.jpg", "/a/labels/train/1.txt"),
        ("/a/images/images/1.v2.jpg", "/a/images/labels/1.v2.txt"),
        ("images/1.jpg", "labels/1.txt"),
        ("/a/train/1.jpg", "/a/train/1.txt"),
        ("/a/myimages/1.jpg", "/a/myimages/1.txt"),
        ("/a/images.jpg", "/a/images.txt"),
    ],
)
def test_the_last_folder_images_becomes_labels(file, expected):
    assert label_path(file) == expected


def test_folders_without_a_data_yaml(root, monkeypatch):
    plain = {"format": "yolo", "images": ["images/train", "images/val"], "classes": NAMES}
    assert len(opened(plain, root)) == 5
    monkeypatch.chdir(root)  # data_root: .
    assert boxes(opened({**plain, "images": "images/val"}, Path("."))) == [[[0, 0, WIDTH, HEIGHT]]]
    unnamed = {"format": "yolo", "images": "images/train"}
    with pytest.raises(DataError, match="hold no class names; set 'classes' of the source or of the task"):
        opened(unnamed, root)
    assert open_source(combine(source(unnamed), NAMES), root).classes == NAMES


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2", "has 4 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "has 6 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3", "has 6 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "has 8 numbers"),
        ("3 0.5 0.5 0.2 0.2", r"class id 3 must lie in 0..2"),
        ("-1 0.5 0.5 0.2 0.2", r"class id -1 must lie in 0..2"),
        ("0.5 0.5 0.5 0.2 0.2", r"class id 0.5 must lie in 0..2"),
        ("ant 0.5 0.5 0.2 0.2", "could not convert string to float: 'ant'"),
        ("0 120 80 40 30", "coordinates must be fractions of the image"),
        ("0 0.5 0.5 -0.2 0.2", "coordinates must be fractions of the image"),
        ("0 nan 0.5 0.2 0.2", "not finite"),
        ("inf 0.5 0.5 0.2 0.2", "not finite"),
    ],
)
def test_lines_that_cannot_be_used_are_named_with_file_and_line(root, line, reason):
    labels(root / "labels" / "train" / "0.txt", "2 0.5 0.5 0.25 0.5", "", line)
    with pytest.raises(DataError, match=f"(?s)labels/train/0.txt: line 3: '{line}': .*{reason}"):
        opened(YOLO, root)
    assert len(errors(YOLO, root)) == 1


def test_what_would_train_on_nothing_is_an_error(root):
    labels(root / "labels" / "train" / "0.txt", "0 0.5 0.5 0 0.2")
    assert "line 1: has no area and is not used in training" in warnings(YOLO, root)
    for i in range(4):
        (root / "labels" / "train" / f"{i}.txt").write_text("")
    with pytest.raises(DataError, match="the label files contain no object"):
        opened(YOLO, root)
    for i in range(4):
        (root / "labels" / "train" / f"{i}.txt").unlink()
    with pytest.raises(
        DataError, match=r"none of the 4 images has a label file \(the first would be .*labels/train/0.txt"
    ):
        opened(YOLO, root)


def test_stray_label_files_and_missing_images_are_reported(root):
    labels(root / "labels" / "train" / "77.txt", "0 0.5 0.5 0.2 0.2")
    labels(root / "labels" / "train" / "classes.txt", *NAMES)
    assert "1 label files belong to no image of the split (first: " in warnings(YOLO, root)
    (root / "list.txt").write_text("images/train/0.png\nimages/train/gone.png\n")
    write_yaml(root, train="list.txt")
    assert [Path(p.file).name for p in errors(YOLO, root)] == ["gone.png"]
    (root / "images" / "train" / "0.png").write_bytes(b"no image")
    assert {Path(p.file).name for p in errors(YOLO, root)} == {"0.png", "gone.png"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"names": {0: "a", 2: "b"}}, r"the ids of 'names' are \[0, 2\]; number the classes from 0 without gaps"),
        ({"nc": 2}, "'nc' is 2, 'names' has 3"),
        ({"names": "ant"}, "'names' must be a list"),
        ({"names": ["ant", "ant", "bee"]}, "class names are used more than once: ant"),
        ({"train": None}, "has no split 'train'; allowed: val"),
        (
            {"train": "images/trian"},
            "images/trian: must be a folder of images or a txt file of paths, it does not exist",
        ),
    ],
)
def test_mistakes_in_data_yaml_are_named(root, keys, message):
    write_yaml(root, **keys)
    with pytest.raises(DataError, match=message):
        opened(YOLO, root)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": None}, "set either 'data'"),
        ({"images": "x"}, "set either 'data'"),
        ({"data": None, "images": "x", "split": "val"}, "'split' is a key of data.yaml"),
    ],
)
def test_keys_without_effect_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        source({**YOLO, **keys})


def test_a_test_set_follows_the_classes_of_the_train_set(root):
    write_yaml(root, names=["cow", "ant", "bee"])
    dataset = opened({**YOLO, "split": "val"}, root, classes=NAMES)
    assert dataset.classes == NAMES and dataset[0]["labels"].tolist() == [2]
    with pytest.raises(DataError, match="class 'bee' is not in the train set"):
        opened({**YOLO, "split": "val"}, root, classes=["ant", "cow"])


def test_outlines_are_filled_for_segmentation_small_ones_above(root):
    masks = {**YOLO, "kind": "segmentation"}
    square = "1 0 0 1 0 1 1 0 1"
    small = "2 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"
    (root / "images" / "train" / "3.png").unlink()
    for i, lines in enumerate(((small, square), (small,), ())):
        labels(root / "labels" / "train" / f"{i}.txt", *lines)
    dataset = opened(masks, root)
    assert dataset.kind == "segmentation" and dataset.classes == ["background", *NAMES]
    whole = dataset[0]["mask"].numpy()
    expected = np.full((HEIGHT, WIDTH), 2, dtype=np.uint8)
    expected[HEIGHT // 4 : 3 * HEIGHT // 4, WIDTH // 4 : 3 * WIDTH // 4] = 3
    assert (whole != expected).mean() < 0.08 and whole.dtype == np.uint8  # the border of an outline counts as inside
    assert set(np.unique(dataset[1]["mask"].numpy())) == {0, 3} and not dataset[2]["mask"].any()
    assert torch.equal(dataset[0]["image"], opened(YOLO, root)[0]["image"])
    # a class called background is that of the pixels outside
    write_yaml(root, names=["background", "bee", "cow"])
    assert opened(masks, root).classes == ["background", "bee", "cow"]
    assert set(np.unique(opened(masks, root)[1]["mask"].numpy())) == {0, 2}


def test_masks_equal_polygons_drawn_point_by_point(root):
    """A pixel is inside if its centre is; pixels that the outline touches may count as inside."""
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    points = np.column_stack([0.5 + 0.4 * np.cos(angles), 0.5 + 0.4 * np.sin(angles)])
    labels(root / "labels" / "train" / "1.txt", "0 " + " ".join(f"{v:.6f}" for v in points.ravel()))
    labels(root / "labels" / "train" / "0.txt", "")
    (root / "labels" / "train" / "2.txt").unlink()
    mask = opened({**YOLO, "kind": "segmentation"}, root)[1]["mask"].numpy()
    scaled = points * (WIDTH, HEIGHT)
    edges = list(zip(scaled, np.roll(scaled, -1, axis=0), strict=True))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = np.ones((HEIGHT, WIDTH), dtype=bool)  # convex, corners in the order of their angles
    distance = np.full((HEIGHT, WIDTH), np.inf)
    for (x1, y1), (x2, y2) in edges:
        side = ((x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)) / np.hypot(x2 - x1, y2 - y1)
        inside &= side >= 0
        distance = np.minimum(distance, np.abs(side))
    assert np.array_equal(mask == 1, inside) or not ((mask == 1) != inside)[distance > 1].any()
    assert abs(int((mask == 1).sum()) - int(inside.sum())) < 0.15 * inside.sum()


def test_boxes_cannot_be_masks(root):
    with pytest.raises(DataError, match="2 of 3 labels are boxes, not outlines; use kind: detection"):
        opened({**YOLO, "kind": "segmentation"}, root)
    with pytest.raises(DataError, match="hold no class names; set 'classes' of the source"):
        opened({"format": "yolo", "images": "images/train", "kind": "segmentation"}, root, classes=NAMES)


def test_a_split_by_fraction_and_the_check_of_all_data(root):
    for part in ("train", "val"):
        labels(root / "labels" / part / "empty.txt", "")
        image(root / "images" / part / "empty.png", 33)
    both = source({**YOLO, "data": None, "images": "images", "classes": NAMES})
    found = check_sources({"it": both}, root, progress=False)
    assert [p.level for p in found] == ["warning", "warning"]  # no label file, equal images
