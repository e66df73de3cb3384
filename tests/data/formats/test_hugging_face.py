"""DatasetsSource and RowsDataset."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from allinone_ds.data.check import check_sources
from allinone_ds.data.formats.rows.dataset import RowsDataset
from allinone_ds.data.formats.rows.hugging_face import DatasetsSource
from allinone_ds.data.inspection.targets import target_problems
from allinone_ds.data.sources import Source, open_source
from allinone_ds.errors import BrokenSample, DataError
from tests.data.tiny_sets import CLASSES, HEIGHT, WIDTH, pixels

datasets = pytest.importorskip("datasets")

COUNT = 4
IMAGES = [Image.fromarray(pixels(i)) for i in range(COUNT)]
BOXES = [[[1.0, 2.0, 10.0, 5.0]], [], [[0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 6.0, 7.0]], [[3.0, 3.0, 3.0, 3.0]]]
KINDS = [[0], [], [1, 2], [2]]


def opened(root, kind, **options):
    config = {"format": "datasets", "path": "set", "kind": kind, **options}
    classes = options.pop("train_classes", None)
    config.pop("train_classes", None)
    return open_source(TypeAdapter(Source).validate_python(config), root, classes=classes)


def save(root, features, rows, as_dict=False):
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (datasets.DatasetDict({"train": table, "test": table}) if as_dict else table).save_to_disk(str(root / "set"))


def save_boxes(root, boxes=BOXES, layout="dict", categories=KINDS):
    label = datasets.ClassLabel(names=CLASSES)
    if layout == "dict":
        objects = {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(label),
        }
        rows = [{"bbox": b, "category": c} for b, c in zip(boxes, categories, strict=True)]
    else:
        objects = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": label})
        rows = [
            [{"bbox": x, "category": y} for x, y in zip(b, c, strict=True)]
            for b, c in zip(boxes, categories, strict=True)
        ]
    save(root, {"image": datasets.Image(), "objects": objects}, {"image": IMAGES, "objects": rows})


@pytest.mark.parametrize("as_dict", [False, True])
def test_classification(tmp_path, as_dict):
    features = {"photo": datasets.Image(), "what": datasets.ClassLabel(names=CLASSES)}
    save(tmp_path, features, {"photo": IMAGES, "what": [0, 1, 2, 1]}, as_dict)
    dataset = opened(tmp_path, "classification", columns={"image": "photo", "label": "what"}, split="train")
    assert (dataset.kind, dataset.classes, len(dataset)) == ("classification", CLASSES, COUNT)
    assert [dataset[i]["label"] for i in range(COUNT)] == [0, 1, 2, 1]
    for i in range(COUNT):
        assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), pixels(i))
        assert dataset[i]["index"] == i and dataset[i]["path"] == f"set[train]#{i}"
    assert check_sources({"it": dataset}, progress=False) == []
    wanted = [CLASSES[::-1].index(CLASSES[i]) for i in (0, 1, 2, 1)]
    reordered = opened(
        tmp_path, "classification", columns={"image": "photo", "label": "what"}, train_classes=CLASSES[::-1]
    )
    assert [reordered[i]["label"] for i in range(COUNT)] == wanted


def test_class_names_in_a_text_column(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    save(tmp_path, features, {"image": IMAGES, "label": ["cow", "ant", "cow", "bee"]})
    dataset = opened(tmp_path, "classification")
    assert dataset.classes == CLASSES and [dataset[i]["label"] for i in range(COUNT)] == [2, 0, 2, 1]


@pytest.mark.parametrize("layout", ["dict", "list"])
@pytest.mark.parametrize("bbox_format", ["coco", "pascal"])
def test_detection(tmp_path, layout, bbox_format):
    stored = [[[x, y, x + w, y + h] for x, y, w, h in b] for b in BOXES] if bbox_format == "pascal" else BOXES
    save_boxes(tmp_path, stored, layout)
    dataset = opened(tmp_path, "detection", bbox_format=bbox_format)
    assert dataset.classes == CLASSES
    for i in range(COUNT):
        sample = dataset[i]
        assert sample["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in BOXES[i]]
        assert sample["boxes"].shape == (len(BOXES[i]), 4) and sample["boxes"].canvas_size == (HEIGHT, WIDTH)
        assert sample["labels"].tolist() == KINDS[i] and sample["labels"].dtype == torch.long
        assert sample["iscrowd"].tolist() == [False] * len(BOXES[i])


def test_a_wrong_bbox_format_is_detected(tmp_path):
    save_boxes(tmp_path, [[[20.0, 10.0, 30.0, 20.0]]] * COUNT, categories=[[0]] * COUNT)
    with pytest.raises(BrokenSample, match="outside its image of 32 x 24.*or change bbox_format .coco"):
        opened(tmp_path, "detection")[0]
    assert len(check_sources({"it": opened(tmp_path, "detection")}, progress=False)) == COUNT
    assert len(opened(tmp_path, "detection", bbox_format="pascal")[0]["boxes"]) == 1


def test_segmentation(tmp_path):
    maps = [np.random.default_rng(i).choice([0, 1, 2, 255], (HEIGHT, WIDTH)).astype(np.uint8) for i in range(COUNT)]
    maps[3] = maps[3][:-1]
    features = {"image": datasets.Image(), "annotation": datasets.Image()}
    save(tmp_path, features, {"image": IMAGES, "annotation": [Image.fromarray(m) for m in maps]})
    dataset = opened(tmp_path, "segmentation", columns={"label_map": "annotation"}, classes=CLASSES)
    assert all(np.array_equal(dataset[i]["mask"].numpy(), maps[i]) for i in range(3))
    with pytest.raises(BrokenSample, match="is 32 x 23"):
        dataset[3]
    shifted = [Image.fromarray((m + 1).astype(np.uint8)) for m in maps]  # as in ADE20K, where 0 is no class
    save(tmp_path, features, {"image": IMAGES, "annotation": shifted})
    from_one = {"ignore_index": 0, "first_id": 1}
    dataset = opened(tmp_path, "segmentation", columns={"label_map": "annotation"}, classes=CLASSES, **from_one)
    assert all(np.array_equal(dataset[i]["mask"].numpy(), maps[i]) for i in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"image": "img"}}, r"columns\.image = 'img'.*allowed: image, label"),
        ({"columns": {"image": "label", "label": "image"}}, "it must be an Image"),
        ({"path": "sett"}, "cannot be loaded"),
        ({"classes": ["only one"]}, "class 1 is not one of the 1 classes"),
    ],
)
def test_a_mistake_in_a_source_is_named(tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    save(
        tmp_path,
        {"image": datasets.Image(), "label": datasets.Value("int64")},
        {"image": IMAGES, "label": [0, 1, 0, 1]},
    )
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "classification", **{"classes": ["x", "y"], **options})


def test_a_missing_split_is_refused_with_the_nearest_name(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    save(tmp_path, features, {"image": IMAGES, "label": [0] * COUNT}, as_dict=True)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'.*allowed: test, train"):
        opened(tmp_path, "classification", split="trian")


def test_broken_images_are_found(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    cells = [
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
        None,
    ]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)
    source = DatasetsSource(format="datasets", path="set", kind="classification")
    found = check_sources({"it": RowsDataset(table, source, "org/name", tmp_path)}, progress=False)
    assert [p.file for p in found] == ["org/name#0", "org/name#1", "org/name#2"]
    reasons = ["not an image", "missing.png: cannot be opened", "has no image"]
    assert all(reason in p.reason for reason, p in zip(reasons, found, strict=True))


@pytest.mark.parametrize("layout", ["dict", "list"])
def test_crowd_boxes_have_iscrowd(tmp_path, layout):
    label, number = datasets.ClassLabel(names=CLASSES), datasets.Value("float32")
    image = Image.fromarray(pixels(0))
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
    save(tmp_path, {"image": datasets.Image(), "objects": inner}, {"image": [image], "objects": [row]})
    sample = opened(tmp_path, "detection")[0]
    assert sample["labels"].tolist() == [0, 2] and sample["iscrowd"].tolist() == [False, True]


def test_coco_boxes_read_as_pascal_are_broken(tmp_path):
    save_boxes(
        tmp_path, [[[20.0, 10.0, 5.0, 5.0]], [], [[0.0, 0.0, 4.0, 4.0]] * 2, []], categories=[[0], [], [1, 2], []]
    )
    with pytest.raises(BrokenSample, match="change bbox_format"):
        opened(tmp_path, "detection", bbox_format="pascal")[0]


def test_boxes_in_fractions_of_the_image_are_broken(tmp_path):
    save_boxes(tmp_path, [[[0.1, 0.1, 0.5, 0.5]], [], [[0.0, 0.0, 1.0, 1.0]] * 2, [[0.0, 0.0, 0.0, 0.0]]])
    dataset = opened(tmp_path, "detection")
    for index in (0, 2):
        with pytest.raises(BrokenSample, match="fractions of the image"):
            dataset[index]
    assert len(dataset[3]["boxes"]) == 0  # without area: an empty box, not fractions


def test_two_classes_stored_as_0_and_255_are_a_warning(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:9] = 255
    rows = {"image": [Image.fromarray(pixels(0))], "label": [Image.fromarray(mask)]}
    save(tmp_path, {"image": datasets.Image(), "label": datasets.Image()}, rows)
    reported = [str(p) for p in opened(tmp_path, "segmentation", classes=CLASSES).structural]
    assert len(reported) == 1 and "which is ignored" in reported[0]


# ---- splits


def save_classes(root, labels=(0, 1, 2, 1), feature=None, **options):
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=CLASSES)}
    save(root, features, {"image": IMAGES, "label": list(labels)}, **options)


@pytest.mark.parametrize("split", ["test", "nonsense", "train["])
def test_one_saved_dataset_has_no_other_split(tmp_path, split):
    save_classes(tmp_path)
    assert len(opened(tmp_path, "classification")) == COUNT == len(opened(tmp_path, "classification", split="train"))
    with pytest.raises(DataError, match=r"set: no split '.*allowed: train.*the folder holds one dataset, not several"):
        opened(tmp_path, "classification", split=split)


def test_a_saved_dataset_keeps_the_name_of_its_split(tmp_path):
    save_classes(tmp_path)
    table = datasets.load_from_disk(str(tmp_path / "set"))
    datasets.Dataset(table.data, split="test").save_to_disk(str(tmp_path / "part"))
    assert opened(tmp_path, "classification", path="part").name == "part[test]"
    assert len(opened(tmp_path, "classification", path="part", split="test")) == COUNT
    with pytest.raises(DataError, match="no split 'train'; .*allowed: test"):
        opened(tmp_path, "classification", path="part", split="train")


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_part_of_a_split_can_be_named(tmp_path, as_dict):
    save_classes(tmp_path, as_dict=as_dict)
    first, rest = (opened(tmp_path, "classification", split=f"train[{part}]") for part in (":75%", "75%:"))
    assert [first[i]["label"] for i in range(len(first))] == [0, 1, 2] and len(rest) == 1
    both = opened(tmp_path, "classification", split="train[:1]+train[3:]")
    assert [both[i]["label"] for i in range(len(both))] == [0, 1]


def test_the_name_of_a_configuration_is_refused_for_a_saved_dataset(tmp_path):
    save_classes(tmp_path)
    with pytest.raises(DataError, match="'name' selects a configuration on the hub"):
        opened(tmp_path, "classification", name="small")


# ---- options


def test_first_id_is_the_id_of_the_first_class(tmp_path):
    save_classes(tmp_path, (1, 2, 3, 2), datasets.Value("int64"))
    dataset = opened(tmp_path, "classification", classes=CLASSES, first_id=1)
    assert [dataset[i]["label"] for i in range(COUNT)] == [0, 1, 2, 1]
    with pytest.raises(DataError, match=r"#2: class 3 is not one of the 3 classes; ids are 0\.\.2 .*first_id"):
        opened(tmp_path, "classification", classes=CLASSES)


def test_first_id_of_boxes(tmp_path):
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.Value("int64")),
    }
    rows = [{"bbox": b, "category": [i + 5 for i in c]} for b, c in zip(BOXES, KINDS, strict=True)]
    save(tmp_path, {"image": datasets.Image(), "objects": objects}, {"image": IMAGES, "objects": rows})
    dataset = opened(tmp_path, "detection", classes=CLASSES, first_id=5)
    assert [dataset[i]["labels"].tolist() for i in range(COUNT)] == KINDS


@pytest.mark.parametrize("feature", [None, datasets.Value("string")])
def test_first_id_is_refused_where_it_has_no_meaning(tmp_path, feature):
    save_classes(tmp_path, CLASSES + CLASSES[:1], feature)
    with pytest.raises(DataError, match="first_id = 1: the column is (a ClassLabel|text).*remove first_id"):
        opened(tmp_path, "classification", first_id=1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classification", {"bbox_format": "pascal"}, "bbox_format is an option of kind detection"),
        ("segmentation", {"bbox_format": "pascal"}, "bbox_format is an option of kind detection"),
        ("detection", {"ignore_index": 0}, "ignore_index is an option of kind segmentation"),
        ("classification", {"columns": {"bbox": "boxes"}}, "columns.bbox is not used by kind classification"),
        ("segmentation", {"columns": {"label": "mask"}}, "columns.label is not used.*image, label_map"),
        ("detection", {"columns": {"label": "class"}}, "columns.label is not used.*category"),
    ],
)
def test_options_of_other_kinds_are_refused(kind, options, message):
    config = {"format": "datasets", "path": "set", "kind": kind, **options}
    with pytest.raises(ValueError, match=message):
        TypeAdapter(Source).validate_python(config)


def test_a_source_reads_back_equal(tmp_path):
    for kind in ("classification", "detection", "segmentation"):
        source = DatasetsSource(format="datasets", path="set", kind=kind)
        assert DatasetsSource.model_validate(source.model_dump(mode="json")) == source


# ---- odd rows


def test_a_row_without_a_class_name_is_an_error(tmp_path):
    save_classes(tmp_path, ["ant", None, "bee", "cow"], datasets.Value("string"))
    with pytest.raises(DataError, match=r"set\[train\]#1: has no class \(null\)"):
        opened(tmp_path, "classification")


def test_a_list_of_classes_per_image_is_refused(tmp_path):
    save_classes(tmp_path, [[0], [1, 2], [], [0]], datasets.List(datasets.Value("int64")))
    with pytest.raises(DataError, match="column 'label' is List.*must hold one class"):
        opened(tmp_path, "classification", classes=CLASSES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"bbox": [None], "category": [0]}, r"must hold four numbers per box, found None"),
        ({"bbox": [[1.0, 2.0, None, 4.0]], "category": [0]}, "outside its image|four numbers"),
        ({"bbox": None, "category": [0]}, "has 0 boxes, 1 categories"),
        ({"bbox": [[1, 1, 4, 4]], "category": [None]}, "has no class"),
        (
            {"bbox": [[1, 1, 4, 4]] * 3, "category": [0, 1, 2], "iscrowd": [0]},
            "3 boxes, 3 categories and 1 values of 'iscrowd'",
        ),
    ],
)
def test_an_odd_row_of_boxes_is_broken(tmp_path, row, message):
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=CLASSES)),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }
    rows = [{"iscrowd": None, **row}, None, {"bbox": None, "category": None, "iscrowd": None}]
    save(tmp_path, {"image": datasets.Image(), "objects": objects}, {"image": IMAGES[:3], "objects": rows})
    dataset = opened(tmp_path, "detection")
    with pytest.raises(BrokenSample, match=message):
        dataset[0]
    assert [len(dataset[i]["boxes"]) for i in (1, 2)] == [0, 0]


def test_crowd_flags_may_be_text(tmp_path):
    objects = datasets.List(
        {
            "bbox": datasets.List(datasets.Value("float32")),
            "category": datasets.Value("int64"),
            "iscrowd": datasets.Value("string"),
        }
    )
    box = {"bbox": [1, 1, 4, 4], "category": 0}
    rows = [[{**box, "iscrowd": "0"}, {**box, "iscrowd": "1"}, {**box, "iscrowd": None}]]
    save(tmp_path, {"image": datasets.Image(), "objects": objects}, {"image": IMAGES[:1], "objects": rows})
    assert opened(tmp_path, "detection", classes=CLASSES)[0]["iscrowd"].tolist() == [False, True, False]


def test_images_of_12_bit_are_read_like_files(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH)).astype(np.uint16)
    values[0, 0] = 4095
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    save(tmp_path, features, {"image": [values], "label": [0]})
    assert np.array_equal(opened(tmp_path, "classification")[0]["image"][2].numpy(), values >> 4)


def test_boxes_are_counted_as_stored_without_decoding_their_images(tmp_path, monkeypatch):
    save_boxes(tmp_path, [[[1, 1, 0, 9]], [], [[0, 0, 4, 4], [5, 5, 0.5, 7]], [[3, 3, 3, 3]]])
    dataset = opened(tmp_path, "detection")
    monkeypatch.setattr("allinone_ds.data.formats.rows.dataset.read_image", None)
    [problem, unused] = target_problems(dataset, (HEIGHT, WIDTH))
    assert problem.reason.startswith(
        "2 of 4 boxes are not used in training: 1 have no area or a negative size, 1 are smaller than 1 pixel"
    )
    assert "no box has category ant" in unused.reason
